"""Checkpoints: written beside and renamed, so that a folder named round-* is always whole.

    checkpoints/round-000120/checkpoint.json   what it belongs to
                             engine/           DeepSpeed: trained parameters, every rank's optimiser state
                             ema.safetensors   the moving average
    checkpoints/latest                         name of the newest, written last

No generator and no prompt cursor is saved, because there are none: draws and prompts are functions of seed and round.
"""

import os
import re
import shutil
from pathlib import Path

from opd_core.artifacts import installed_versions
from opd_core.errors import InvalidError, RefusedError, StorageError
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from opd_trainer.ema import Ema
from opd_trainer.engine import Engine, World, barrier

MANIFEST, LATEST, ENGINE, EMA = "checkpoint.json", "latest", "engine", "ema.safetensors"
_FOLDER = re.compile(r"round-(\d{6,})")


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
    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    identity: Identity
    versions: dict[str, str]


def save(directory: Path, round_: int, engine: Engine, ema: Ema, identity: Identity, world: World, keep: int) -> Path:
    """Write the checkpoint of `round_` finished rounds and delete all but the newest `keep`. All ranks call it.

    Raises:
        StorageError: disk full or not writable. Older checkpoints are untouched then.
    """
    final = directory / f"round-{round_:06d}"
    partial = directory / f".partial-{round_:06d}"
    try:
        if world.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        barrier(world)
        engine.save(str(partial), ENGINE)
        barrier(world)
        if world.rank == 0:
            save_file({str(i): tensor.cpu() for i, tensor in enumerate(ema.tensors)}, partial / EMA)
            manifest = Manifest(round=round_, identity=identity, versions=installed_versions())
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
            _sync(partial)
            if final.exists():  # of a run that stopped before it could write `latest`
                shutil.rmtree(final)
            partial.rename(final)
            _write_latest(directory, final.name)
            for old in _folders(directory)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        barrier(world)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_storage_failure(error):
            raise
        free = _free_space(directory)  # torch's own error does not say that the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint of round {round_} to {directory}, where {free}: {error}; older checkpoints "
            "are intact; free some space and start again"
        ) from error
    return final


def _free_space(directory: Path) -> str:
    usage = shutil.disk_usage(next(place for place in (directory, *directory.parents) if place.exists()))
    return f"{usage.free / 1e6:.1f} MB of {usage.total / 1e6:.1f} MB are free"


def latest(directory: Path) -> tuple[Path, Manifest] | None:
    """The checkpoint that a new start continues from, if there is one.

    Raises:
        InvalidError: there is one, but its description cannot be read.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    folder = directory / pointer.read_text().strip()
    try:
        return folder, Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        raise InvalidError(
            f"checkpoint {folder} cannot be read: {error}; delete it and write the name of an older one to {pointer}"
        ) from error


def load(folder: Path, manifest: Manifest, engine: Engine, ema: Ema, identity: Identity) -> None:
    """Continue from a checkpoint of the same identity.

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
        engine.load(str(folder), ENGINE)
        stored = load_file(folder / EMA)
    except (OSError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise InvalidError(
            f"checkpoint {folder} is damaged: {error}; delete it and write the name of an older one to "
            f"{folder.parent / LATEST}"
        ) from error
    ema.load([stored[str(i)] for i in range(len(stored))])


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


def _is_storage_failure(error: Exception) -> bool:
    """torch reports a full disk as a RuntimeError of its zip writer."""
    return not isinstance(error, RuntimeError) or any(
        writer in str(error) for writer in ("PytorchStreamWriter", "inline_container")
    )


def _folders(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in directory.iterdir() if _FOLDER.fullmatch(path.name))


def _write_latest(directory: Path, name: str) -> None:
    scratch = directory / f".{LATEST}"
    scratch.write_text(name + "\n")
    _sync_path(scratch)
    scratch.replace(directory / LATEST)
    _sync_path(directory)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder, folder.parent):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
