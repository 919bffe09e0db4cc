"""`python -m opd_serving.teacher.prepare`: checks base and teachers, writes the model repository, and ends.

A process of its own, whose PyTorch is gone when the server starts.
"""

import argparse
import sys
from pathlib import Path

from opd_core.api.load import load_spec
from opd_core.device import choose_device
from opd_core.errors import InvalidError, OPDError
from opd_core.models.preflight import refuse, teacher_notes, teacher_problems
from opd_core.models.teacher_files import teacher_files
from opd_core.process import leave
from opd_core.termination import last_words
from opd_core.uris import resolve

from opd_serving.teacher import arguments
from opd_serving.teacher.repository import write_repository


def main(argv: list[str] | None = None) -> int:
    try:
        prepare(arguments.parse(argv))
    except OPDError as error:
        print(f"teacher server: {error}", file=sys.stderr)
        last_words(error.exit_code, str(error))
        return int(error.exit_code)
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Raises InvalidError: an unknown teacher or none at all, a base that cannot be used, a teacher that does not fit
    it."""
    spec = load_spec(options.spec).spec
    known = [teacher.name for teacher in spec.teachers if teacher.teaches]
    if not known:
        raise InvalidError("the tasks of the spec have no teachers; give one its adapter, model or training")
    unknown = sorted(set(options.teacher) - set(known))
    if unknown:
        raise InvalidError(f"--teacher {unknown[0]}: the spec has no such teacher; it has {', '.join(known)}")
    served = [teacher for teacher in spec.teachers if teacher.name in (options.teacher or known)]

    def find(uri: str) -> Path:
        return resolve(uri, options.claims)

    names = [teacher.name for teacher in served]
    refuse(teacher_problems(spec, find, names), options.spec)
    for note in teacher_notes(spec, find, names):
        print(f"teacher server: {note}", flush=True)
    info = write_repository(
        options.repository,
        base=find(spec.model.uri),
        teachers={teacher.name: teacher_files(spec, teacher, find) for teacher in served},
        precision=spec.teacher_serving.precision.value,
        max_sequence_length=spec.model.max_sequence_length,
        device=choose_device(options.device),
        adapter_bytes=options.adapter_bytes,
    )
    print(f"teacher server: {', '.join(info.teachers)} for {info.base[:19]}, {info.precision}", flush=True)


if __name__ == "__main__":
    leave(main())
