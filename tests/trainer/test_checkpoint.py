"""What a checkpoint is tied to, what it survives, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.errors import InvalidError, RefusedError
from opd_trainer import checkpoint
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import World
from opd_trainer.loop import play_round
from opd_trainer.run import Run
from safetensors.torch import load_file, save_file

IDENTITY = Identity(
    training_digest="sha256:a", base="sha256:b", teachers={"ocr": "sha256:c"}, prompts={"ocr": "sha256:d"},
    world_size=1, zero_stage=0,
)  # fmt: skip
CONSTANT = {"spec.training.optimizer": {"learningRate": 1e-3}}


def save(run: Run, folder: Path, round_: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, round_, {"student": run.engine}, {"ema": run.ema.tensors}, IDENTITY, run.world, keep)


def step(run: Run, round_: int) -> None:
    play_round(run, round_)
    run.engine.step(1e-3)
    run.ema.update(round_)


SFT = {"spec.training.method": "SFT"}
PDM = {"spec.training.objective": {"type": "PDM"}}
DRAWN = {
    "spec.training.sampler": {"type": "SDE", "steps": 3, "noiseLevel": 0.7},
    "spec.training.objective": {"type": "PPO", "stepsPerRound": 1},
}


@pytest.mark.parametrize(
    ("stage", "method"),
    [(0, {}), (1, {}), (2, {}), (0, SFT), (0, DRAWN), (0, PDM)],
    ids=["0", "1", "2", "SFT", "PPO, drawn steps", "PDM"],
)
def test_weights_optimiser_and_average_come_back_exactly(
    make_run: Callable[..., Run], tmp_path: Path, stage: int, method: dict[str, Any]
) -> None:
    changes = {"spec.training.deepspeed.zeroStage": stage, **method}
    run = make_run(changes)
    step(run, 0)
    folder = save(run, tmp_path, 1)
    step(run, 1)
    expected = [p.detach().clone() for p in run.engine.parameters], [t.clone() for t in run.ema.tensors]

    resumed = make_run(changes)
    found = checkpoint.latest(tmp_path, run.world)
    assert found is not None
    assert found[0] == folder
    checkpoint.load(*found, {"student": resumed.engine}, {"ema": resumed.ema.tensors}, IDENTITY, run.world)
    step(resumed, found[1].round)
    assert all(torch.equal(a, b) for a, b in zip(resumed.engine.parameters, expected[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.tensors, expected[1], strict=True))


def test_only_the_newest_are_kept_and_latest_names_the_newest(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    for round_ in (5, 10, 1_000_000):
        save(run, tmp_path, round_)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-000010", "round-1000000"]
    assert checkpoint.latest(tmp_path, run.world)[1].round == 1_000_000  # type: ignore[index]
    save(run, tmp_path, 999_999)  # after an older one was named by hand
    save(run, tmp_path, 1_000_001)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-1000000", "round-1000001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_digest": "sha256:x"}, "training_digest: the checkpoint has sha256:a, this run sha256:x"),
        ({"teachers": {"ocr": "sha256:x"}}, "teachers: "),
        ({"base": "sha256:x"}, "base: "),
        ({"prompts": {"ocr": "sha256:x"}}, "prompts: "),
        ({"world_size": 2}, "written by 1 ranks, and this run has 2; set nodes x processesPerNode to 1"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    make_run: Callable[..., Run], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = make_run()
    save(run, tmp_path, 1)
    folder, manifest = checkpoint.latest(tmp_path, run.world)  # type: ignore[misc]
    with pytest.raises(RefusedError, match=message):
        checkpoint.load(
            folder,
            manifest,
            {"student": run.engine},
            {"ema": run.ema.tensors},
            IDENTITY.model_copy(update=change),
            run.world,
        )


def test_a_damaged_checkpoint_is_named_with_what_to_do(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    step(run, 0)
    folder = save(run, tmp_path, 1)
    manifest = checkpoint.latest(tmp_path, run.world)[1]  # type: ignore[index]
    for name in ("ema.safetensors", "student.safetensors", "optimizer-00000.safetensors"):
        content = (folder / name).read_bytes()
        for broken in (None, b"cut", content[:-1]):
            (folder / name).unlink()
            if broken is not None:
                (folder / name).write_bytes(broken)
            with pytest.raises(InvalidError, match="round-000001 is damaged.*older one"):
                checkpoint.load(
                    folder, manifest, {"student": run.engine}, {"ema": run.ema.tensors}, IDENTITY, run.world
                )
            (folder / name).write_bytes(content)
    for name in ("ema.safetensors", "student.safetensors", "optimizer-00000.safetensors"):
        whole = load_file(folder / name)
        first = next(key for key, tensor in whole.items() if tensor.numel() > 1)
        fewer = {key: tensor for key, tensor in whole.items() if key.partition(".")[0] != first.partition(".")[0]}
        for other in ({**whole, first: torch.ones(1)}, fewer):  # whole files of something else
            save_file(other, folder / name)
            with pytest.raises(InvalidError, match="round-000001 is damaged"):
                checkpoint.load(
                    folder, manifest, {"student": run.engine}, {"ema": run.ema.tensors}, IDENTITY, run.world
                )
        save_file(whole, folder / name)
    for text in (json.dumps({"round": 1}), "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (folder / checkpoint.MANIFEST).write_text(text)
        with pytest.raises(InvalidError, match="cannot be read"):
            checkpoint.latest(tmp_path, run.world)


def test_a_folder_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    alone = World(0, 1, 0)
    assert checkpoint.latest(tmp_path / "absent", alone) is None
    (tmp_path / ".partial-000001").mkdir()
    assert checkpoint.latest(tmp_path, alone) is None


@pytest.mark.parametrize(
    "name",
    ["/etc", "../round-000001", "round-000001/../../x", "round-1", "", "round-" + "\u0660" * 6, "round-" + "1" * 5000],
)
def test_latest_names_a_checkpoint_of_its_own_folder_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "latest").write_text(name)
    with pytest.raises(InvalidError, match="latest does not hold the name of a checkpoint"):
        checkpoint.latest(tmp_path, World(0, 1, 0))


class Attack:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_of_a_checkpoint_is_unpickled(make_run: Callable[..., Run], tmp_path: Path, stage: int) -> None:
    """Neither files in the place of ours, nor DeepSpeed's under the names that it would look for."""
    run = make_run({"spec.training.deepspeed.zeroStage": stage})
    step(run, 0)
    folder = save(run, tmp_path, 1)
    manifest = checkpoint.latest(tmp_path, run.world)[1]  # type: ignore[index]
    mark = tmp_path / "mark"
    (folder / "engine").mkdir()
    for name in ("engine/mp_rank_00_model_states.pt", "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(Attack(mark), folder / name)
    checkpoint.load(folder, manifest, {"student": run.engine}, {"ema": run.ema.tensors}, IDENTITY, run.world)
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        torch.save(Attack(mark), file)
        with pytest.raises(InvalidError, match="is damaged"):
            checkpoint.load(folder, manifest, {"student": run.engine}, {"ema": run.ema.tensors}, IDENTITY, run.world)
        file.write_bytes(content)
    assert not mark.exists()
    torch.load(folder / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
    assert mark.exists(), "the attack is one"


RANK = """
import os, sys
from pathlib import Path
import torch
from opd_core.errors import StorageError
from opd_trainer import checkpoint
from opd_trainer.engine import World

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
world = World(rank, 2, rank)


class Full:
    parameters = [torch.zeros(3)]

    def optimizer_state(self):
        if rank == int(sys.argv[2]):
            raise OSError(28, "No space left on device")
        return {}


try:
    state = {"ema": Full.parameters}
    checkpoint.save(folder, 7, {"student": Full()}, state, checkpoint.Identity.model_validate_json(sys.argv[3]), world, 2)
except StorageError as error:
    print("StorageError", error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_full_disk_of_one_rank_is_heard_by_all_at_once(
    tmp_path: Path, free_port: Callable[[], int], failing: str
) -> None:
    """Two real ranks; before, the others waited for half an hour in a collective that nobody would come to."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), failing, IDENTITY.model_dump_json()],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    for rank, words in enumerate(said):
        cause = "No space left" if str(rank) == failing else "another rank could not write"
        assert "StorageError cannot write the checkpoint of round 7" in words
        assert cause in words
    assert not list(tmp_path.glob("*round*"))


def test_ranks_continue_at_the_round_that_rank_0_sees(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """A shared file system may show the pods different pointers for a while."""
    program = (
        "import os, sys; from pathlib import Path; import torch; from opd_trainer import checkpoint\n"
        "from opd_trainer.engine import World\n"
        "rank = int(os.environ['RANK']); torch.distributed.init_process_group('gloo')\n"
        "print(checkpoint.latest(Path(sys.argv[1 + rank]), World(rank, 2, rank))[1].round)\n"
    )
    for name, newest in (("a", 2), ("b", 1)):
        for round_ in (1, 2):
            folder = tmp_path / name / f"round-{round_:06d}"
            folder.mkdir(parents=True)
            manifest = checkpoint.Manifest(round=round_, identity=IDENTITY, versions={})
            (folder / checkpoint.MANIFEST).write_text(manifest.model_dump_json())
        (tmp_path / name / "latest").write_text(f"round-{newest:06d}")
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "b")],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["2", "2"]
