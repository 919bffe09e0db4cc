"""The small parts: learning rate, average, batches, log, metrics, port, launcher, limits."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from opd_core.api.training import LearningRateSchedule, Optimizer, Training
from opd_core.conditioning import Conditioning
from opd_core.device import is_out_of_memory
from opd_core.diffusion.schedule import Schedule
from opd_core.diffusion.transitions import transitions
from opd_core.errors import DivergedError, InvalidError, UnavailableError
from opd_core.exit_codes import ExitCode
from opd_core.families.sd3 import SD3
from opd_core.models.adapters import load_adapter
from opd_core.scales import Scales
from opd_core.termination import fit, last_words
from opd_trainer import loop
from opd_trainer.batches import Row, rank_rows
from opd_trainer.ema import Ema
from opd_trainer.encoders import PromptCache
from opd_trainer.engine import Engine, World, init_distributed, is_peer_loss, learning_rate, shutdown
from opd_trainer.launch import rank_environments, supervise
from opd_trainer.log import RoundLog
from opd_trainer.loop import EXPLODED, check_finite, play_round, train
from opd_trainer.metrics import Metrics
from opd_trainer.rank import run_rank
from opd_trainer.record import RoundRecord, TaskRecord, task_record
from opd_trainer.run import Run
from opd_trainer.server import serve
from opd_trainer.setup import all_teachers, load_tasks
from opd_trainer.train import SMALLER
from peft.tuners.tuners_utils import BaseTunerLayer
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

RECORD = RoundRecord(
    round=1, seconds=2.0, tasks={"ocr": TaskRecord(0.5, 0.25, [0.2, 0.3], [0.04, None])}, loss=0.5, grad_norm=1.5,
    learning_rate=1e-3, images=8, phases={"rollout": 1.0, "teacher_wait": 0.25, "update": 0.5},
    teacher_requests=3, teacher_retries=1,
)  # fmt: skip
VALIDATED = replace(RECORD, round=2, teacher_requests=6, rewards={"ocr": {"tiny-ocr": 0.75}})


def test_learning_rate_warms_up_and_falls_along_a_cosine_to_zero() -> None:
    optimizer = Optimizer(learning_rate=1.0, warmup_rounds=4, schedule=LearningRateSchedule.COSINE)
    rates = [learning_rate(optimizer, 14, r) for r in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.05
    assert {learning_rate(Optimizer(learning_rate=1.0), 14, r) for r in range(14)} == {1.0}


def test_average_follows_its_recurrence_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    ema, expected = Ema([parameter], 0.9), 0.0
    for round_ in range(100):
        with torch.no_grad():
            parameter.fill_(float(round_ + 1))
        ema.update(round_)
        decay = min(0.9, (1 + round_) / (10 + round_))
        expected = decay * expected + (1 - decay) * (round_ + 1)
    assert float(ema.tensors[0][0]) == pytest.approx(expected, rel=1e-5)
    off = Ema([parameter], 0.0)
    with torch.no_grad():
        parameter.fill_(7.0)
    off.update(3)
    assert torch.equal(off.tensors[0], torch.full((2,), 7.0))


def test_ranks_share_every_task_and_lose_no_image() -> None:
    everyone = [row for rank in range(4) for batch in rank_rows(3, 8, rank, 4, None) for row in batch]
    assert sorted((row.task, row.sample) for row in everyone) == [(t, s) for t in range(3) for s in range(8)]
    assert rank_rows(2, 4, 1, 2, 1) == [[Row(0, 2)], [Row(0, 3)], [Row(1, 2)], [Row(1, 3)]]


def test_prompts_are_encoded_once_while_there_is_room() -> None:
    calls: list[str] = []

    def encode(prompts: Any) -> list[Conditioning]:
        calls.extend(prompts)
        return [Conditioning({"embeds": torch.zeros(1, 1)}) for _ in prompts]

    remember = PromptCache(encode, 2)
    remember(["a", "b", "a"])
    remember(["a"])
    assert calls == ["a", "b"]
    remember(["c"])  # b was used longest ago
    remember(["a", "c"])
    assert calls == ["a", "b", "c"]
    remember(["b"])
    assert calls == ["a", "b", "c", "b"]
    assert len(remember(["x", "y", "z"])) == 3


def test_a_resumed_log_repeats_no_round(tmp_path: Path) -> None:
    log = RoundLog(tmp_path, 0)
    for round_ in (1, 2, 3):
        log.write(replace(RECORD, round=round_), "now")
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"round": 4, "sec')  # a killed process
    log = RoundLog(tmp_path, 2)
    log.write(replace(RECORD, round=3), "later")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["round"], line["time"]) for line in lines] == [(1, "now"), (2, "now"), (3, "later")]
    assert {"rollout_seconds", "teacher_wait_seconds", "update_seconds", "images_per_second"} <= set(lines[0])
    assert lines[0]["tasks"]["ocr"]["kl_per_step"] == [0.04, None]
    assert "rewards" not in lines[0]
    assert VALIDATED.line()["rewards"] == {"ocr": {"tiny-ocr": 0.75}}


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RoundLog(tmp_path, 0, tensorboard=True)
    log.write(RECORD, "now")
    log.write(VALIDATED, "later")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]

    assert scalars("loss/ocr") == [(1, 0.5), (2, 0.5)]
    assert scalars("kl/ocr") == [(1, 0.04), (2, 0.04)]
    assert scalars("reward/ocr/tiny-ocr") == [(2, 0.75)]


def test_the_port_serves_metrics_progress_and_health(free_port: Callable[[], int]) -> None:
    """Whatever else hangs on it."""
    metrics, port, threads = Metrics(["ocr"], 10), free_port(), threading.active_count()
    end = serve(metrics, "127.0.0.1", port)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    try:
        metrics.resumed(0)
        metrics.finish_round(RECORD)
        metrics.finish_round(VALIDATED)
        metrics.saved(2, Path("checkpoints/round-000002"), 0.0)

        def get(page: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=10) as answer:
                return answer.read().decode()

        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(get("/metrics"))
            for sample in family.samples
        }
        assert threading.active_count() == threads + 1
        assert samples["opd_train_loss", "ocr"] == 0.5
        assert samples["opd_train_step_loss", "1", "ocr"] == 0.3
        assert samples["opd_train_kl", "ocr"] == samples["opd_train_step_kl", "0", "ocr"] == 0.04
        assert ("opd_train_step_kl", "1", "ocr") not in samples
        assert samples["opd_train_reward", "ocr", "tiny-ocr"] == 0.75
        assert samples["opd_train_images_total",] == 16
        assert samples["opd_train_teacher_requests_total",] == 6
        assert samples["opd_train_teacher_retries_total",] == 1
        assert samples["opd_train_phase_seconds_total", "rollout"] == 2.0
        assert samples["opd_train_round",] == 2
        assert all(family.documentation for family in text_string_to_metric_families(get("/metrics")))
        progress = json.loads(get("/progress"))
        assert progress["percentage"] == 20.0
        assert progress["remainingSeconds"] == 16.0
        assert progress["imagesPerSecond"] == 4.0
        assert progress["metrics"] == [
            {"task": "ocr", "loss": 0.5, "kl": 0.04, "velocityMse": 0.25, "reward/tiny-ocr": 0.75}
        ]
        assert progress["checkpoint"] == {"round": 2, "path": "checkpoints/round-000002"}
        with pytest.raises(UnavailableError, match=str(port)):
            serve(metrics, "127.0.0.1", port)
    finally:
        end()
        for each in silent:
            each.close()


def test_the_time_left_counts_the_validations_to_come() -> None:
    metrics = Metrics(["ocr"], 10, validate_every=4)
    metrics.validated(time.monotonic() - 100)
    metrics.finish_round(replace(RECORD, round=4))  # 6 rounds of 2 s and the validation of round 8
    assert metrics.progress["remainingSeconds"] == pytest.approx(112, abs=2)
    metrics.finish_round(replace(RECORD, round=8))
    assert metrics.progress["remainingSeconds"] == pytest.approx(4, abs=0.1)


def test_the_kl_is_there_whatever_the_objective_where_there_is_noise() -> None:
    """Of each step with noise, and of no other; the loss and the velocity error are over trained steps."""
    schedule = Schedule(np.array([1.0, 0.8, 0.4, 0.0]))
    noisy, mse = transitions(schedule, "DDIM", 0.7), [4.0, 2.0, 1.0]
    assert [step.std > 0 for step in noisy] == [True, True, False]
    record = task_record(mse, mse, [1.0, 1.0, 1.0], noisy)
    expected = [step.b**2 / (2 * step.std**2) * error for step, error in zip(noisy[:2], mse, strict=False)]
    assert record.kl_per_step == [*expected, None]
    assert record.kl == pytest.approx(sum(expected))
    assert (record.loss, record.loss_per_step) == (7.0, mse)

    half_the_images = task_record([0.0, 6.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.0], noisy)
    assert half_the_images.kl_per_step == [None, expected[1], None]
    assert (half_the_images.loss, half_the_images.velocity_mse, half_the_images.kl) == (6.0, 2.0, expected[1])

    deterministic = task_record(mse, mse, [1.0, 1.0, 1.0], transitions(schedule, "Flow", 0.0))
    assert (deterministic.kl, deterministic.kl_per_step) == (None, [])


TWO_TASKS = replace(
    RECORD,
    tasks={"ocr": TaskRecord(9.0, 1.0, [1.0, 8.0], []), "mute": TaskRecord(99.0, 1.0, [99.0, 0.0], [])},
    grad_norm=2 * EXPLODED,
    loss=9.0,
)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            replace(RECORD, tasks={"ocr": TaskRecord(0.5, 0.2, [0.1, float("nan")], [])}),
            "round 1: the loss of task ocr is nan at step 1",
        ),
        (replace(RECORD, grad_norm=float("nan")), "norm is nan"),
        (
            TWO_TASKS,
            r"norm is 2e\+04, and 10000 times .*maxGradNorm=1 .*largest of the loss 9 is task ocr at solver step 1: 8\.",
        ),
    ],
)
def test_what_is_not_finite_or_explodes_ends_training(record: RoundRecord, message: str) -> None:
    """A task without weight pulls at nothing, however far its teacher is."""
    shares = {"ocr": 1.0, "mute": 0.0}
    with pytest.raises(DivergedError, match=message):
        check_finite(record, shares, 1.0)
    check_finite(RECORD, shares, 1.0)


def test_training_learns(make_run: Callable[..., Run]) -> None:
    # One round of one, again and again: the same prompts and noise, so the loss must fall.
    run = make_run({"spec.training.rounds": 1, "spec.training.optimizer": {"learningRate": 5e-3}})
    records: list[RoundRecord] = []
    for _ in range(8):
        train(run, 0, lambda record, stop: records.append(record), lambda: False)
    assert records[-1].loss < 0.8 * records[0].loss
    assert all(record.grad_norm > 0 for record in records)


def test_stopping_ends_after_the_round(make_run: Callable[..., Run]) -> None:
    seen: list[tuple[int, bool]] = []
    train(make_run(), 1, lambda record, stop: seen.append((record.round, stop)), lambda: len(seen) == 1)
    assert seen == [(2, False), (3, True)]


@dataclass
class Clock:
    """Seconds that pass only where a test says so, and a device that computes what was queued when a result is needed."""

    now: float = 0.0
    queued: float = 0.0

    def drain(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_waiting_for_a_teacher_is_not_waiting_for_the_own_device(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is copied from the device while student forwards of 5 s are queued there; a teacher takes 1 s more."""
    run, clock, copy = make_run(), Clock(), torch.Tensor.cpu
    real = run.method.teachers.submit

    class Answer(Future[torch.Tensor]):
        def done(self) -> bool:
            return False

        def result(self, timeout: float | None = None) -> torch.Tensor:
            clock.now += 1
            return super().result(timeout)

    def submit(*arguments: Any) -> Future[torch.Tensor]:
        velocity, answer = real(*arguments).result(), Answer()
        clock.queued += 5
        answer.set_result(velocity)
        return answer

    def cpu(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        clock.drain()
        return copy(tensor, *arguments, **named)

    monkeypatch.setattr(run.method.teachers, "submit", submit)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr("opd_trainer.run.time", SimpleNamespace(perf_counter=lambda: clock.now))
    play_round(run, 0)
    asked = len(run.tasks) * len(run.path)
    assert run.seconds["teacher_wait"] == asked * 1
    assert run.seconds["rollout"] >= 5 * (asked - len(run.tasks))


@pytest.mark.parametrize("stage", [0, 1])
def test_an_overflow_of_float16_skips_the_step_and_halves(
    make_run: Callable[..., Run], stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really too large inside the network: two rounds make no step, the third does."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 1)
    small = {"imagesPerTask": 1, "sampler": {"type": "ODE", "steps": 1}, "precision": "FP16"}
    changes = {f"spec.training.{name}": value for name, value in small.items()}
    run = make_run({**changes, "spec.training.deepspeed.zeroStage": stage})

    def amplify(module: nn.Module, inputs: Any, outputs: Any) -> None:
        image = outputs[-1]
        if image.requires_grad:
            image.register_hook(lambda gradient: (gradient.half() * factor).to(gradient.dtype))

    run.model.transformer.transformer_blocks[0].register_forward_hook(amplify)
    before = [parameter.detach().clone() for parameter in run.engine.parameters]
    records: list[RoundRecord] = []

    def play(round_: int) -> RoundRecord:
        run.training = run.training.model_copy(update={"rounds": round_ + 1})
        train(run, round_, lambda record, stop: records.append(record), lambda: False)
        return records[-1]

    factor = 2.0**30
    for halvings in (1, 2):
        record = play(halvings - 1)
        assert record.skipped
        assert run.scale is not None
        assert run.scale.halvings == halvings
        assert record.line()["grad_norm"] is None
        assert all(torch.equal(p, q) for p, q in zip(run.engine.parameters, before, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(run.ema.tensors, before, strict=True))
    factor = 1.0
    record = play(2)
    assert not record.skipped
    assert record.grad_norm > 0
    assert run.scale.halvings == 2
    assert not all(torch.equal(p, q) for p, q in zip(run.engine.parameters, before, strict=True))
    factor = 2.0**30
    run.training = run.training.model_copy(update={"rounds": 100})
    with pytest.raises(DivergedError, match=r"overflowed in 2 rounds in a row.*training\.precision to BF16"):
        train(run, 3, lambda record, stop: None, lambda: False)


def test_the_bucket_of_zero_is_as_large_as_the_gradient(make_run: Callable[..., Run]) -> None:
    """DeepSpeed allocates the whole of it."""
    run = make_run({"spec.training.deepspeed.zeroStage": 1})
    assert run.engine._engine.optimizer.reduce_bucket_size == sum(p.numel() for p in run.engine.parameters)


def test_a_second_process_group_of_a_process_trains_as_the_first(world: World) -> None:
    """Under every stage of ZeRO; evaluation and training may follow each other in one process."""
    norms = []
    for _ in range(2):
        for stage in (0, 1, 2):
            weight = nn.Parameter(torch.ones(4))
            engine = Engine([weight], Optimizer(), stage)
            engine.backward(weight.square().sum(), last=True)
            norms.append(engine.step(0.1))
            engine.close()
        shutdown()
        assert init_distributed("cpu") == world
    assert norms == [4.0] * 6


def test_no_prompts_are_refused_before_anything_is_loaded(make_spec, tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-world").symlink_to(tiny_world)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "none.txt").touch()
    spec = make_spec({"spec.teachers.0.prompts.uri": "pvc://prompts/none.txt"}).spec
    with pytest.raises(InvalidError, match="holds no prompts"):
        load_tasks(spec, tmp_path)


def test_an_initial_adapter_must_have_the_spec_s_rank(make_run: Callable[..., Run]) -> None:
    with pytest.raises(InvalidError, match="spec.student.adapter.rank is 8: the adapter of initFrom has 16"):
        make_run({"spec.student.initFrom": "pvc://tiny-world/teachers/ocr"})


def test_a_student_may_start_from_the_mean_of_its_teachers(
    make_run: Callable[..., Run], make_spec, tiny_claims: Path
) -> None:
    changes = {"spec.student.initFromTeachers": True, "spec.student.adapter": {"rank": 48, "alpha": 96}}
    run = make_run(changes)
    assert all(parameter.requires_grad for parameter in run.engine.parameters)
    transformer = run.model.transformer
    teachers = all_teachers(make_spec(changes).spec, tiny_claims)
    for name, adapter in teachers.items():
        load_adapter(transformer, adapter, name)
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    for layer in layers:
        mean = sum(layer.get_delta_weight(name) for name in teachers) / len(teachers)
        torch.testing.assert_close(layer.get_delta_weight("student"), mean, rtol=1e-4, atol=1e-6)


def test_a_student_with_more_layers_than_its_start_starts_as_that(make_run: Callable[..., Run]) -> None:
    adapter = {"rank": 16, "alpha": 32, "targetModules": [*SD3.targets, "ff.net.2"]}
    run = make_run({"spec.student.initFrom": "pvc://tiny-world/teachers/ocr", "spec.student.adapter": adapter})
    x = torch.randn((1, *run.model.latent_shape(32, 32)), generator=torch.Generator().manual_seed(0))
    prompt, scales, sigma = run.encode(["3 1"]), Scales(4.5), torch.tensor([0.9])
    student = run.model.velocity(x, sigma, run.model.prompts(prompt, [run.negative], [scales]))
    teacher = run.method.teachers.submit("ocr", x, sigma, torch.tensor([scales]), prompt, run.negative).result()
    torch.testing.assert_close(student, teacher, rtol=1e-4, atol=1e-4)
    wider = [p for name, p in run.model.transformer.named_parameters() if "ff.net.2.lora_" in name]
    assert wider
    assert all(parameter.requires_grad for parameter in wider)


# ---------------------------------------------------------------------------------------------------- last words


def test_last_words_fit_whatever_is_said() -> None:
    """Sixteen tasks with the longest names that a spec allows, and a message without end."""
    row = {"reward": "r" * 128, "base": 0.1234, "teacher": 0.5678, "student": 0.4321, "kept": 0.7011}
    scores = [{"task": f"{i:02}" + "t" * 61, **row} for i in range(16)]
    words = {"exitCode": 0, "digest": "sha256:" + "0" * 64, "gatePassed": False, "scores": scores}
    for message in ("short", "long " * 2000, "ä\n" * 5000):
        text = fit({**words, "message": message})
        assert 2000 < len(text.encode()) <= 4096
        said = json.loads(text)
        assert {key: said[key] for key in ("exitCode", "digest", "gatePassed")} == {
            key: words[key] for key in ("exitCode", "digest", "gatePassed")
        }
        assert [row["kept"] for row in said["scores"]] == [0.7011] * 16
        assert said["message"].startswith(message[:20].rstrip())
    assert json.loads(fit({**words, "message": "short"}, 100_000)) == {**words, "message": "short"}


def test_last_words_fit_even_where_nothing_but_the_outcome_can_stay() -> None:
    words = {"exitCode": 4, "digest": "sha256:" + "0" * 64, "gatePassed": False, "scores": [{"task": "t"}] * 999}
    outcome = {**words, "scores": []}
    assert json.loads(fit(words, len(json.dumps(outcome, separators=(",", ":"))))) == outcome


def test_the_first_to_speak_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "termination"
    file.touch()  # as the kubelet does
    monkeypatch.setenv("OPD_TERMINATION_LOG", str(file))
    last_words(5, "diverged")
    last_words(75, "another rank was lost")
    assert json.loads(file.read_text()) == {"exitCode": 5, "message": "diverged"}


# ---------------------------------------------------------------------------------------------------- launcher


def test_a_collective_without_its_peer_is_told_from_other_errors(free_port: Callable[[], int]) -> None:
    """Gloo's own errors: a peer that is gone and one that is silent; and a rendezvous that nobody holds."""
    program = (
        "import os, sys, torch, torch.distributed as dist\n"
        "from datetime import timedelta\n"
        "from opd_trainer.engine import is_peer_loss\n"
        "dist.init_process_group('gloo', timeout=timedelta(seconds=60))\n"
        "dist.all_reduce(torch.ones(1))\n"
        "silent = dist.new_group([0, 1], timeout=timedelta(seconds=5))\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.stdin.read()\n"
        "    os.kill(os.getpid(), 9)\n"
        "for group in (silent, None):\n"
        "    try:\n"
        "        dist.all_reduce(torch.ones(1), group=group)\n"
        "    except RuntimeError as error:\n"
        "        print(is_peer_loss(error), str(error).splitlines()[0], flush=True)\n"
    )
    port = str(free_port())
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    assert first.stdout is not None
    assert first.stdout.readline().startswith("True ")
    second.communicate("", timeout=60)
    output, _ = first.communicate(timeout=60)
    assert output.startswith("True ")

    with pytest.raises(RuntimeError) as nobody:
        torch.distributed.TCPStore("127.0.0.1", free_port(), timeout=timedelta(seconds=1))
    assert is_peer_loss(nobody.value)
    assert not is_peer_loss(RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64"))
    assert not is_peer_loss(ValueError("/gloo/]"))


def test_ranks_of_several_nodes_are_numbered_by_the_pod() -> None:
    training = Training(rounds=1, images_per_task=4, nodes=2, processes_per_node=2)
    pod = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "trainer-0.trainer", "PET_MASTER_PORT": "29500", "HOME": "/h"}
    first, second = rank_environments(training, pod)
    assert (first["RANK"], second["RANK"], first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("2", "3", "0", "1")
    assert (first["WORLD_SIZE"], first["MASTER_ADDR"], first["MASTER_PORT"], first["HOME"]) == (
        "4", "trainer-0.trainer", "29500", "/h",
    )  # fmt: skip
    with pytest.raises(InvalidError, match="needs PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT"):
        rank_environments(training, {})
    with pytest.raises(InvalidError, match="PET_NNODES is 3"):
        rank_environments(training, {**pod, "PET_NNODES": "3"})


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left open, each of eight ranks takes all cores. What the environment says stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(20)))
    training = Training(rounds=1, images_per_task=24, processes_per_node=8)
    assert {environment["OMP_NUM_THREADS"] for environment in rank_environments(training, {})} == {"2"}
    alone = training.model_copy(update={"processes_per_node": 1})
    assert rank_environments(alone, {})[0]["OMP_NUM_THREADS"] == "20"
    assert rank_environments(training, {"OMP_NUM_THREADS": "5"})[0]["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 5), 5), ((1, 75), 75), ((5, 75), 5), ((75, 5), 5), ((-9, 75), 137), ((-6, 0), 75), ((-6, 5), 5)],
)
def test_the_launcher_ends_with_the_code_of_the_cause(codes: tuple[int, int], expected: int) -> None:
    """Each rank is a program that ends with its code. A rank says 75, is aborted, or breaks with 1 when its peer is
    gone, and may even be seen before it."""
    program = (
        "import os, signal, sys, time\n"
        "code = int(os.environ['CODE'])\n"
        "time.sleep(0.3 if code in (1, 5) else 0)\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    )
    environments = [{"CODE": str(code), "PATH": ""} for code in codes]
    assert supervise([sys.executable, "-c", program], environments) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_has_its_own_code_and_names_what_makes_the_work_smaller(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program() -> int:
        raise error

    monkeypatch.setenv("OPD_TERMINATION_LOG", str(tmp_path / "words"))
    assert run_rank(program, smaller=SMALLER) == ExitCode.OUT_OF_MEMORY
    said = json.loads((tmp_path / "words").read_text())
    assert said["exitCode"] == 6
    assert "training.microBatchSize" in said["message"]
    assert "training.gradientCheckpointing" in said["message"]
    assert not ExitCode.OUT_OF_MEMORY.retryable
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_real_allocation_that_cannot_be_had_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's own words on this machine, not what we believe them to be."""
    assert run_rank(lambda: int(torch.empty(1 << 60)[0]), smaller=SMALLER) == ExitCode.OUT_OF_MEMORY
    assert "too little memory" in capsys.readouterr().err
    assert run_rank(lambda: 1 // 0, smaller=SMALLER) == ExitCode.INTERNAL
