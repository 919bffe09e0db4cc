"""Checkpoints: written beside and renamed, so that a folder named round-* is always whole.

    checkpoints/round-000120/checkpoint.json         what it belongs to
                             student.safetensors     trained parameters; fake.safetensors of a fake score
                             ema.safetensors         their moving average, and what else the method keeps
                             optimizer-00000.safetensors   of every rank: its part of the optimiser's state;
                                                           optimizer-fake-00000.safetensors of the fake score's
    checkpoints/latest                               name of the newest, written last

Numbers and JSON, nothing that is unpickled: DeepSpeed's own files are, and whoever can write into the claim would run
code in the trainer. No generator and no prompt cursor is saved, because there are none: draws and prompts are functions
of seed and round.

Ranks go through a checkpoint together: after every part each hears whether another one failed, so that a full disk of
one pod does not leave the others in a collective.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opd_core.artifacts import installed_versions
from opd_core.errors import InvalidError, RefusedError, StorageError
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_trainer.engine import Engine, World, broadcast, copy_all, total
from opd_trainer.run import STUDENT

MANIFEST, LATEST = "checkpoint.json", "latest"
Engines = Mapping[str, Engine]  # by the name of the role that they train
State = Mapping[str, Sequence[Tensor]]  # beside the trained parameters, by the name of their file: ema, old
_FOLDER = re.compile(r"round-(\d{6,12})", re.ASCII)


class Identity(BaseModel):
    """What a checkpoint belongs to; resuming under another identity is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training_digest: str
    base: str
    teachers: dict[str, str]
    prompts: dict[str, str]
    world_size: int
    zero_stage: int


class Manifest(BaseModel):
    """`halvings`: how often FP16's gradients overflowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    halvings: int = 0
    identity: Identity
    versions: dict[str, str]


def save(
    directory: Path,
    round_: int,
    engines: Engines,
    state: State,
    identity: Identity,
    world: World,
    keep: int,
    *,
    halvings: int = 0,
) -> Path:
    """Write the checkpoint of `round_` finished rounds and delete all but the newest `keep`. All ranks call it.

    Raises:
        StorageError, on every rank: disk full or not writable for one of them. Older checkpoints are untouched then.
    """
    final = directory / f"round-{round_:06d}"
    partial = directory / f".partial-{round_:06d}"

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def write_shared() -> None:
        for name, tensors in {**{role: engine.parameters for role, engine in engines.items()}, **state}.items():
            _write(partial / f"{name}.safetensors", tensors)
        manifest = Manifest(round=round_, halvings=halvings, identity=identity, versions=installed_versions())
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        _sync_path(partial / MANIFEST)

    def write_own() -> None:
        for role, engine in engines.items():
            file = partial / _optimizer_file(role, world.rank)
            save_file({key: tensor.cpu().contiguous() for key, tensor in engine.optimizer_state().items()}, file)
            _sync_path(file)
        if world.rank == 0:
            write_shared()

    def publish() -> None:
        _sync_path(partial)
        if final.exists():  # of a run that stopped before it could write `latest`
            shutil.rmtree(final)
        partial.rename(final)
        _write_latest(directory, final.name)
        for old in _folders(directory)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    for part in (prepare if world.rank == 0 else None, write_own, publish if world.rank == 0 else None):
        try:
            _together(part, world)
        except StorageError as error:
            free = _free_space(directory)
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise StorageError(
                f"cannot write the checkpoint of round {round_} to {directory}, where {free}: {error}; older "
                "checkpoints are intact; free some space and start again"
            ) from error
    return final


def latest(directory: Path, world: World) -> tuple[Path, Manifest] | None:
    """The checkpoint that a new start continues from, if there is one. All ranks call it.

    Rank 0 reads its name for all: a shared file system may show the pods different ones for a while.

    Raises:
        InvalidError, on every rank: there is one, but its name is none or its description cannot be read.
    """
    newest = broadcast(_newest(directory) if world.rank == 0 else 0, world)
    pointer = directory / LATEST
    if newest == _NONE:
        return None
    if newest == _NO_NAME:
        raise InvalidError(
            f"{pointer} does not hold the name of a checkpoint; write one into it, round-000120 for example, or delete "
            "it to start anew"
        )
    folder = directory / f"round-{newest:06d}"
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise InvalidError(
            f"checkpoint {folder} cannot be read: {error}; delete it and write the name of an older one to {pointer}"
        ) from error
    return folder, manifest


def load(folder: Path, manifest: Manifest, engines: Engines, state: State, identity: Identity, world: World) -> None:
    """Continue from a checkpoint of the same identity; its numbers go into the tensors of `state`.

    Raises:
        RefusedError: it belongs to something else. InvalidError: its files are damaged.
    """
    differences = _differences(manifest.identity, identity)
    if differences:
        raise RefusedError(
            f"checkpoint {folder} does not belong to this run; use another work folder, or the spec it was made with:\n"
            + "\n".join(f"  {line}" for line in differences)
        )
    try:
        kept = {name: _read(folder / f"{name}.safetensors") for name in (*engines, *state)}
        for role, engine in engines.items():
            engine.restore(kept[role], load_file(folder / _optimizer_file(role, world.rank)))
        for name, tensors in state.items():
            copy_all(kept[name], tensors)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise InvalidError(
            f"checkpoint {folder} is damaged: {error}; delete it and write the name of an older one to "
            f"{folder.parent / LATEST}"
        ) from error


def _differences(found: Identity, wanted: Identity) -> list[str]:
    if found.world_size != wanted.world_size:
        # DeepSpeed cuts the optimiser state into one part per rank and cannot cut it again.
        return [
            f"it was written by {found.world_size} ranks, and this run has {wanted.world_size}; "
            f"set nodes x processesPerNode to {found.world_size}"
        ]
    theirs, ours = found.model_dump(), wanted.model_dump()
    return [
        f"{name}: the checkpoint has {theirs[name]}, this run {ours[name]}"
        for name in ours
        if theirs[name] != ours[name]
    ]


def _together(part: Callable[[], None] | None, world: World) -> None:
    """Do this rank's part of what all do, and wait until all have done theirs.

    Raises:
        StorageError: one of them could not.
    """
    failure: Exception | None = None
    try:
        if part is not None:
            part()
    except (OSError, SafetensorError) as error:
        failure = error
    failed = total(float(failure is not None), world)
    if failure is not None:
        raise StorageError(str(failure)) from failure
    if failed:
        raise StorageError("another rank could not write its part")


def _write(file: Path, tensors: Sequence[Tensor]) -> None:
    # Copies: under ZeRO the parameters are views of one buffer, which safetensors refuses to write in parts.
    save_file({str(i): tensor.detach().cpu().clone() for i, tensor in enumerate(tensors)}, file)
    _sync_path(file)


def _read(file: Path) -> list[Tensor]:
    stored = load_file(file)
    return [stored[str(i)] for i in range(len(stored))]


def _optimizer_file(role: str, rank: int) -> str:
    return f"optimizer{'' if role == STUDENT else f'-{role}'}-{rank:05d}.safetensors"


_NONE, _NO_NAME = -1, -2


def _newest(directory: Path) -> int:
    """The round that `latest` names; `_NONE` without such a file, `_NO_NAME` where it says something else."""
    try:
        with (directory / LATEST).open("rb") as file:
            said = file.read(64)
    except FileNotFoundError:
        return _NONE
    except OSError:
        return _NO_NAME
    name = _FOLDER.fullmatch(said.decode(errors="replace").strip())
    return int(name[1]) if name else _NO_NAME


def _free_space(directory: Path) -> str:
    usage = shutil.disk_usage(next(place for place in (directory, *directory.parents) if place.exists()))
    return f"{usage.free / 1e6:.1f} MB of {usage.total / 1e6:.1f} MB are free"


def _folders(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    found = [(int(name[1]), path) for path in directory.iterdir() if (name := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _write_latest(directory: Path, name: str) -> None:
    scratch = directory / f".{LATEST}"
    scratch.write_text(name + "\n")
    _sync_path(scratch)
    scratch.replace(directory / LATEST)
    _sync_path(directory)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
