"""Everything about a spec's files that can be found wrong in seconds, before a program is started for hours."""

import json
import subprocess
import sys
from pathlib import Path

from opd_core.api.load import load_spec
from opd_core.api.types import Spec
from opd_core.errors import OPDError
from opd_core.process import die_with_parent, leave
from opd_core.uris import claim_path, resolve


def check_files(name: str, spec: Path, claims: Path) -> None:
    """Look at base, adapters, resolution, prompts and rewards; remote files are not fetched for it.

    In a process of its own: rewards need PyTorch, which would stay in the runner's memory for the whole run.

    Raises:
        InvalidError: all problems of the distillation `name`.
    """
    from opd_core.models.preflight import refuse

    program = [sys.executable, "-m", __spec__.name, str(spec), str(claims)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        raise OPDError(f"the check of the spec's files ended with code {done.returncode}:\n{done.stderr}")
    refuse(json.loads(done.stdout.splitlines()[-1]), name)  # a reward's package may print something before


def problems(spec: Spec, claims: Path) -> list[str]:
    """Each names a field, its value, what is wrong and what to do."""

    def find(uri: str) -> Path | None:
        return None if claim_path(uri, claims) is None else resolve(uri, claims)

    from opd_core.models.preflight import student_problems, teacher_problems
    from opd_trainer.preflight import data_problems

    names = [teacher.name for teacher in spec.teachers]
    models = [*teacher_problems(spec, find, names), *student_problems(spec, find)]
    return [*models, *data_problems(spec, claims, find)]


if __name__ == "__main__":
    die_with_parent()
    print(json.dumps(problems(load_spec(Path(sys.argv[1])).spec, Path(sys.argv[2]))))
    leave(0)
