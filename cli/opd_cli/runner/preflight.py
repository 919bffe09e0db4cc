"""Everything about a spec's files that can be found wrong in seconds, before a program is started for hours."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opd_core.api.load import load_spec
from opd_core.api.types import Spec
from opd_core.device import choose_device
from opd_core.errors import InvalidError, OPDError
from opd_core.process import die_with_parent, leave
from opd_core.uris import claim_path, resolve

from opd_cli.runner.gpus import VISIBLE, visible


@dataclass(frozen=True)
class Checked:
    """The GPUs that a run may use, as CUDA_VISIBLE_DEVICES names them; and what is no fault but should be known."""

    gpus: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_files(name: str, spec: Path, claims: Path, device: str) -> Checked:
    """Look at device, base, adapters, resolution, prompts and rewards; remote files are not fetched for it.

    In a process of its own: rewards need PyTorch, which would stay in the runner's memory for the whole run.

    Raises:
        InvalidError: all problems of the distillation `name`.
    """
    from opd_core.models.preflight import refuse

    program = [sys.executable, "-m", __spec__.name, str(spec), str(claims), device]
    done = subprocess.run(program, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        raise OPDError(f"the check of the spec's files ended with code {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])  # a reward's package may print something before
    refuse(found["problems"], name)
    return Checked(tuple(found["gpus"]), tuple(found["notes"]))


def problems(spec: Spec, claims: Path) -> list[str]:
    """Each names a field, its value, what is wrong and what to do."""
    from opd_core.models.preflight import adapter_problems, teacher_problems
    from opd_trainer.preflight import data_problems

    names = [teacher.name for teacher in spec.teachers if not teacher.training]  # the others are still to be trained
    find = partial(_find, claims=claims)
    models = [*teacher_problems(spec, find, names), *adapter_problems(spec, find)]
    return [*models, *data_problems(spec, claims, find)]


def notes(spec: Spec, claims: Path) -> list[str]:
    """Of a spec without problems."""
    from opd_trainer.preflight import data_notes

    return data_notes(spec, claims, partial(_find, claims=claims))


def _find(uri: str, claims: Path) -> Path | None:
    return None if claim_path(uri, claims) is None else resolve(uri, claims)


def gpus(device: str) -> tuple[str, ...]:
    """GPUs to choose from: none on a CPU, and none where `device` names one by its number.

    Raises:
        InvalidError: there is no such device.
    """
    if choose_device(device) != "cuda":
        return ()
    import torch

    return visible(torch.cuda.device_count(), os.environ.get(VISIBLE))


def main(spec: Path, claims: Path, device: str) -> None:
    wrong: list[str] = []
    found: tuple[str, ...] = ()
    try:
        found = gpus(device)
    except InvalidError as error:
        wrong.append(str(error))
    loaded = load_spec(spec).spec
    wrong += problems(loaded, claims)
    print(json.dumps({"problems": wrong, "gpus": found, "notes": [] if wrong else notes(loaded, claims)}))


if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    leave(0)
