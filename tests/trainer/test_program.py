"""The trainer as a program, under its launcher and under torchrun, with faults injected for real."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.artifacts import CARD, read_student
from opd_core.exit_codes import ExitCode
from opd_core.model_card import model_card
from opd_core.models.adapters import add_student_adapter, save_adapter
from opd_core.models.pipeline import load_model
from safetensors.torch import load_file

from tests.forks import Program

from .conftest import SDE, Trainer

# Adam divides a gradient by its own size, and so makes a rounding error of a small one as large as the step itself.
# With epsilon far above every gradient the step is about learningRate * gradient, and rounding stays rounding.
SMOOTH = {"learningRate": 1.0, "epsilon": 1.0, "schedule": "Cosine", "warmupRounds": 1}
ZERO_1 = {
    **SDE,
    "spec.training.optimizer": SMOOTH,
    "spec.training.deepspeed.zeroStage": 1,
    "spec.evaluation": {"everyRounds": 2, "promptsPerTask": 3, "sampler": {"steps": 1}},
}
TWO_RANKS = {**ZERO_1, "spec.training.processesPerNode": 2}
ENDLESS = {
    "spec.training.rounds": 100_000,
    "spec.training.optimizer": {"learningRate": 1.0e-3},
    "spec.training.checkpoint": {"everyRounds": 100_000, "keep": 2},
}


@pytest.fixture(scope="module")
def reference(trainer: Trainer) -> Path:
    """An uninterrupted run."""
    code, output = trainer.run("reference", ZERO_1)
    assert code == 0, output
    return trainer.folder / "reference"


def student(work: Path) -> dict[str, torch.Tensor]:
    _, weights = read_student(work / "student")
    return load_file(weights)


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str] | Program", seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        if process.poll() is not None:
            pytest.fail(f"the trainer ended with {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    pytest.fail("waited too long")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time", "seconds", "images_per_second", "teacher_requests")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in log]


def test_a_second_run_in_one_folder_waits_and_leaves_when_it_is_told_to(trainer: Trainer) -> None:
    """Of another object with the same spec and output, or of a pod that is gone only for the cluster."""
    work = trainer.folder / "shared"
    (work / "train").mkdir(parents=True)
    with (work / "train" / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = trainer.start("shared", ZERO_1)
        assert isinstance(second, Program)
        wait_for(lambda: second.log.exists() and "another run is at work in" in second.log.read_text(), second)
        assert not (work / "checkpoints").exists()
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == ExitCode.TERMINATED
    assert [path.name for path in (work / "train").iterdir()] == ["lock"]


def test_a_run_leaves_log_checkpoints_and_a_student(trainer: Trainer, reference: Path) -> None:
    log = trainer.log("reference")
    assert [line["round"] for line in log] == [1, 2, 3, 4]
    assert set(log[0]["tasks"]) == {"geneval", "ocr", "aesthetic"}
    for task in log[0]["tasks"].values():
        assert len(task["loss_per_step"]) == 3
        assert task["kl_per_step"] == pytest.approx(task["loss_per_step"], rel=1e-6)  # the objective is the KL here
    assert [set(line.get("rewards", {})) for line in log] == [set(), set(log[0]["tasks"])] * 2
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["latest", "round-000002", "round-000004"]
    assert (reference / "checkpoints" / "latest").read_text() == "round-000004\n"
    manifest, _ = read_student(reference / "student")
    assert manifest.round == 4
    assert manifest.recipe is not None
    assert (manifest.recipe.method, manifest.recipe.objective, manifest.recipe.seed) == ("OPD", "KL", 42)
    assert (reference / "student" / CARD).read_text() == model_card(manifest)
    assert [teacher.name for teacher in manifest.teachers] == ["geneval", "ocr", "aesthetic"]
    # The base and its frozen weights are not in the checkpoint.
    assert sum(file.stat().st_size for file in (reference / "checkpoints" / "round-000004").rglob("*")) < 3_000_000


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(trainer: Trainer, reference: Path) -> None:
    process = trainer.start("killed", ZERO_1)
    wait_for(lambda: len(trainer.log("killed")) >= 3, process)
    ranks = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ranks
    assert not any(alive(rank) for rank in ranks), "a rank outlived its launcher"

    code, output = trainer.run("killed", ZERO_1)
    assert code == 0, output
    assert "continuing after round 2" in output
    ours, theirs = student(trainer.folder / "killed"), student(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_times(trainer.log("killed")) == without_times(trainer.log("reference"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("whole", {"spec.training.deepspeed.zeroStage": 2}),
        ("in-parts", {"spec.training.microBatchSize": 1}),  # one task after the other, on each rank
    ],
)
def test_two_ranks_under_torchrun_equal_one(
    trainer: Trainer, reference: Path, name: str, changes: dict[str, Any]
) -> None:
    two_ranks(trainer, name, {**TWO_RANKS, **changes}, "-m", "opd_trainer.train")
    assert_same(trainer, name, reference.name)


# As a full card would have it: the plan may cut a round where it likes, in the midst of a task.
CUT = """
import dataclasses, sys
from opd_trainer import setup, train
plan = setup.plan
setup.plan = lambda *told: dataclasses.replace(plan(*told), micro_batch_size=3)
sys.exit(train.main())
"""


def test_batches_of_two_tasks_on_two_ranks_equal_one_batch_on_one(trainer: Trainer) -> None:
    """Each rank has two images of each of three tasks, three at a time."""
    more = {"spec.training.imagesPerTask": 4}
    code, output = trainer.run("whole-round", {**ZERO_1, **more})
    assert code == 0, output
    program = trainer.folder / "cut.py"
    program.write_text(CUT)
    output = two_ranks(trainer, "mixed", {**TWO_RANKS, **more}, str(program))
    assert "6 images of a rank: 3 at once" in output
    assert_same(trainer, "mixed", "whole-round")


def two_ranks(trainer: Trainer, name: str, changes: dict[str, Any], *program: str) -> str:
    """What the ranks of `program` print."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    code, output = trainer.run(name, changes, program=torchrun)
    assert code == 0, output
    return output


def assert_same(trainer: Trainer, name: str, other: str) -> None:
    """Two runs saw and learnt the same, up to rounding."""
    for two, one in zip(trainer.log(name), trainer.log(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        for task, rewards in one.get("rewards", {}).items():
            assert two["rewards"][task] == pytest.approx(rewards, abs=1e-4)
    ours, theirs = student(trainer.folder / name), student(trainer.folder / other)
    for side in ("lora_A", "lora_B"):
        names = [name for name in theirs if side in name]
        largest = max(float(theirs[name].abs().max()) for name in names)
        assert largest > 0.05  # B starts at zero: the student has moved
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in names) < 2e-5 * largest


def test_sigterm_finishes_the_round_saves_and_says_so(trainer: Trainer, free_port: Callable[[], int]) -> None:
    last_words, port = trainer.folder / "termination", free_port()
    last_words.touch()
    process = trainer.start(
        "stopped",
        ENDLESS,
        "--metrics-port",
        str(port),
        "--metrics-host=::",
        env={"OPD_TERMINATION_LOG": str(last_words)},
    )
    wait_for(lambda: len(trainer.log("stopped")) >= 2, process)

    def page(name: str, host: str = "127.0.0.1") -> str:
        with urllib.request.urlopen(f"http://{host}:{port}/{name}", timeout=10) as answer:
            return answer.read().decode()

    progress, metrics = json.loads(page("progress")), page("metrics", "[::1]")
    assert progress["stage"] == "Training"
    assert progress["round"] >= 1
    assert progress["totalRounds"] == 100_000
    assert {metric["task"] for metric in progress["metrics"]} == {"geneval", "ocr", "aesthetic"}
    assert 'opd_train_loss{task="ocr"}' in metrics
    assert page("healthz") == "ok\n"

    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == ExitCode.TERMINATED, output
    done = trainer.log("stopped")[-1]["round"]
    assert (trainer.folder / "stopped" / "checkpoints" / "latest").read_text() == f"round-{done:06d}\n"
    said = json.loads(last_words.read_text())
    assert said["exitCode"] == ExitCode.TERMINATED
    assert f"after round {done}" in said["message"]

    # A full disk at the next checkpoint: the kernel refuses to write files beyond a limit.
    limited = ["bash", "-c", 'ulimit -f 120; exec "$0" "$@"', sys.executable, "-m", "opd_trainer.launch"]
    often = {**ENDLESS, "spec.training.checkpoint": {"everyRounds": 1, "keep": 2}}
    code, output = trainer.run("stopped", often, program=limited)
    assert code == ExitCode.STORAGE, output
    assert "older checkpoints are intact" in output
    folder = trainer.folder / "stopped" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", f"round-{done:06d}"]
    assert (folder / "latest").read_text() == f"round-{done:06d}\n"


def test_a_rank_that_is_killed_ends_the_others_which_may_be_started_again(
    trainer: Trainer, free_port: Callable[[], int]
) -> None:
    """Two pods of one rank each, on IPv6: the one that loses its peer in a collective must not look like a defect.

    The second one's host has no name in DNS (pytorch/pytorch#8672, vllm-project/vllm#7074), and its user none in
    /etc/passwd (h2oai/h2o-llmstudio#974, llm-d/llm-d-benchmark#1573).
    """
    nameless = 'hostname nobody.invalid; exec unshare --user --map-user=65999 "$0" "$@"'
    unnamed = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", nameless]
    last_words = trainer.folder / "lost-peer"
    network = {"PET_MASTER_ADDR": "::1", "PET_MASTER_PORT": str(free_port())}
    first, second = (
        trainer.start(
            "lost",
            {**ENDLESS, "spec.training.nodes": 2},
            program=[*unnamed, sys.executable, "-m", "opd_trainer.launch"] if node == "1" else None,
            env={**network, "PET_NODE_RANK": node, "OPD_TERMINATION_LOG": str(last_words)},
        )
        for node in ("0", "1")
    )
    wait_for(lambda: trainer.log("lost"), first)
    ranks = children(first.pid) + children(second.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    second.communicate(timeout=200)
    output, _ = first.communicate(timeout=200)
    assert second.returncode == 128 + signal.SIGKILL
    assert first.returncode == ExitCode.UNAVAILABLE, output
    assert ExitCode(first.returncode).retryable
    said = json.loads(last_words.read_text())
    assert said["exitCode"] == ExitCode.UNAVAILABLE
    assert "another rank was lost" in said["message"]
    assert not any(alive(rank) for rank in ranks)


def test_a_rank_that_waits_for_its_peers_leaves_at_once(trainer: Trainer, free_port: Callable[[], int]) -> None:
    """The second pod of two whose first one is unschedulable, so that its name is not in DNS yet: it asks again
    (pytorch/pytorch#73682, meta-pytorch/torchx#541). It waited on for minutes after SIGTERM, with its GPUs."""
    network = {"PET_MASTER_ADDR": "trainer-0.invalid", "PET_MASTER_PORT": str(free_port()), "PET_NODE_RANK": "1"}
    launcher = [sys.executable, "-m", "opd_trainer.launch"]
    process = trainer.start("lonely", {**ENDLESS, "spec.training.nodes": 2}, program=launcher, env=network)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("rank 1 of 2 meets the others at trainer-0.invalid:")
    (rank,) = children(process.pid)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == ExitCode.TERMINATED
    assert not alive(rank)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_place(trainer: Trainer, tiny_base: Path) -> None:
    model = load_model(tiny_base, parts={"transformer"})
    add_student_adapter(model.transformer, rank=8, alpha=16, target_modules=model.family.targets, seed=0)
    for name, parameter in model.transformer.named_parameters():
        if ".student." in name:
            parameter.data.fill_(1e30)
    claims = trainer.folder / "diverging"
    (claims / "start").mkdir(parents=True)
    (claims / "tiny-world").symlink_to(tiny_base.parent)
    save_adapter(model.transformer, claims / "start")
    code, output = trainer.run("diverged", {"spec.student.initFrom": "pvc://start"}, claims=claims)
    assert code == ExitCode.DIVERGED, output
    assert "round 1: the student left the finite numbers before step 1 on task geneval" in output
    assert not (trainer.folder / "diverged" / "checkpoints").exists()


def test_what_nobody_knows_and_prompts_that_are_not_there_are_all_named_before_the_first_round(
    trainer: Trainer,
) -> None:
    wrong = {
        "spec.teachers.0.rewards": ["tiny-geneval", "geneval-tyni"],
        "spec.training.objective.type": "velocity",
        "spec.evaluation.sampler.solver": "Heun",
        "spec.teachers.2.prompts": {"uri": "pvc://tiny-world/prompts/none.jsonl"},
    }
    code, output = trainer.run("wrong", wrong)
    assert code == ExitCode.INVALID, output
    assert "spec.teachers[0].rewards[1] is geneval-tyni" in output
    assert "spec.teachers[2].prompts.uri" in output
    assert "spec.training.objective.type is velocity: there is no objective velocity; registered are KL," in output
    assert "spec.evaluation.sampler.solver is Heun: there is no solver Heun" in output
    assert not trainer.log("wrong")
