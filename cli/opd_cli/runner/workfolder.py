"""The folder of one run: who may use it, for which spec, and what is done already."""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from opd_core.api.digests import claims_of, weights_fields
from opd_core.api.load import dump_spec, load_spec
from opd_core.api.types import OPDDistillation
from opd_core.errors import InvalidError, StorageError
from opd_core.uris import parse

# The programs of a killed run hold the lock until they are gone.
_LOCK_SECONDS = 10.0


class WorkFolder:
    """Layout, lock and record of the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_descriptors: tuple[int, ...] = ()

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def claims(self) -> Path:
        return self.path / "claims"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    def checkpoint(self) -> int | None:
        """Round of the checkpoint that a start continues from, if there is one."""
        return newest_checkpoint(self.checkpoints)

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def prepare(self, distillation: OPDDistillation, spec_file: Path, claims: Mapping[str, Path]) -> None:
        """Write spec and claims.

        Args:
            claims: folders by claim; any other claim is the folder of its name beside the spec file. The student's
                output gets a new folder under `outputs/` where there is none.

        Raises:
            InvalidError: the folder holds weights of another distillation, or a claim has no folder; nothing has
                changed.
        """
        content = dump_spec(distillation)
        if self.spec.exists() and (self.checkpoints.exists() or self.student.exists()):
            differing = _differences(weights_fields(load_spec(self.spec)), weights_fields(distillation))
            if differing:
                raise InvalidError(
                    f"{self.path} holds a run of another spec; it differs in {', '.join(differing[:5])}. "
                    "Choose another folder with --work, or delete this one"
                )
        folders = self._claim_folders(distillation, content, spec_file, claims)
        self.claims.mkdir(exist_ok=True)
        for claim, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            link = self.claims / f".{claim}"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.resolve())
            link.replace(self.claims / claim)
        self.write_json(self.spec.name, content)

    def _claim_folders(
        self, distillation: OPDDistillation, content: Any, spec_file: Path, claims: Mapping[str, Path]
    ) -> dict[str, Path]:
        used, folders = claims_of(content["spec"]), {}
        if unused := sorted(set(claims) - used):
            raise InvalidError(f"--claim {unused[0]}: the spec names no such claim; it has {', '.join(sorted(used))}")
        output = parse(distillation.spec.student.output.uri)
        for claim in sorted(used):
            folder = claims.get(claim, spec_file.resolve().parent / claim)
            if not folder.is_dir():
                if claim in claims or not (output.scheme == "pvc" and output.place == claim):
                    raise InvalidError(
                        f"claim {claim} has no folder: {folder} is not there; name one with --claim {claim}=DIR"
                    )
                folder = self.path / "outputs" / claim
            folders[claim] = folder
        return folders

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second runner out. Programs that get `lock_descriptors` keep the lock as long as they live.

        Raises:
            InvalidError: another run uses the folder. StorageError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "lock").open("a+")
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}; choose another folder with --work") from error
        with handle:
            self._lock(handle)
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            self.lock_descriptors = (handle.fileno(),)
            yield

    def _lock(self, handle: IO[str]) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                handle.seek(0)
                holder = handle.read().strip()
                if time.monotonic() > deadline or Path("/proc", holder or "0").exists():
                    raise InvalidError(
                        f"another `opd run` (process {holder}) uses {self.path}; "
                        f"watch it with `tail -f {self.path}/events.jsonl`, or choose another folder with --work"
                    ) from error
            time.sleep(0.1)

    def done(self, stage: str) -> dict[str, Any] | None:
        """What `finish` recorded for a stage, if it did."""
        state: dict[str, dict[str, Any]] = self._state()
        return state.get(stage)

    def finish(self, stage: str, **facts: Any) -> None:
        self.write_json("state.json", {**self._state(), stage: facts})

    def write_json(self, name: str, content: Any) -> None:
        """The whole file or none of it.

        Raises:
            StorageError: it cannot be written.
        """
        scratch = self.path / f".{name}"
        try:
            scratch.write_text(json.dumps(content, indent=2) + "\n")
            scratch.replace(self.path / name)
        except OSError as error:
            raise StorageError(f"cannot write {self.path / name}: {error}") from error

    def _state(self) -> dict[str, dict[str, Any]]:
        file = self.path / "state.json"
        return json.loads(file.read_text()) if file.exists() else {}


def newest_checkpoint(folder: Path) -> int | None:
    """Round of the checkpoint that a start continues from, of those in `folder`, if there is one."""
    pointer = folder / "latest"
    found = re.search(r"\d+", pointer.read_text()) if pointer.exists() else None
    return int(found[0]) if found else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    paths = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
    return [f"{path} ({old.get(path)!r} -> {new.get(path)!r})" for path in paths]
