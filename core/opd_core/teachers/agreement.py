"""What trainer and teachers check before the first round: the same models, and answers that hold."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning
from opd_core.diffusion.noise import draw
from opd_core.errors import RefusedError
from opd_core.models.fingerprint import fingerprint
from opd_core.models.teacher_files import TeacherFiles, teacher_fingerprint
from opd_core.scales import Scales
from opd_core.teachers.client import TeacherClient

_CONCURRENT = 8
_BATCHES = (8, 32)
_SIGMA = 0.7
_NOISE = 0.1  # of the distance that is learnt: a hundredth of the loss


def check_identity(
    client: TeacherClient, *, base: Path, teachers: Mapping[str, TeacherFiles], max_sequence_length: int
) -> None:
    """The servers hold these teachers for this base, and prompts have the length that both sides compute with.

    The base's fingerprint covers its scheduler's configuration, so both sides would make the same schedule; the servers
    make none, since every query brings its noise level.

    Raises:
        RefusedError: with every difference.
    """
    info = client.describe()
    wrong = []
    if info.base != (ours := fingerprint(base)):
        wrong.append(f"base: the server has {info.base}, spec.model.uri has {ours}")
    if info.max_sequence_length != max_sequence_length:
        wrong.append(f"maxSequenceLength: the server has {info.max_sequence_length}, the spec {max_sequence_length}")
    for name, files in teachers.items():
        theirs, ours = info.teachers.get(name, "none"), teacher_fingerprint(files)
        if theirs != ours:
            wrong.append(f"teacher {name}: the server has {theirs}, the spec's is {ours}")
    if wrong:
        raise RefusedError(
            "the teacher service does not match the spec; start it from this spec:\n  " + "\n  ".join(wrong)
        )


def self_test(
    client: TeacherClient,
    scales: Mapping[str, Scales],
    tried: Collection[str],
    shape: Sequence[int],
    conditioning: Conditioning,
    negative: Conditioning,
    student: Callable[[Tensor, float], Tensor],
    rounding: float,
) -> float:
    """Ask every teacher one row alone, one teacher after the other, and then all at once, so that servers may compute
    rows of several in one batch; those of `tried` are asked eight times then, and in batches of 8 and 32. All answers
    of a teacher must agree.

    How a server computes a row is the same for all of its teachers, so one in `tried` speaks for them, and 50 teachers
    cost two rows each. What differs is noise in what the student learns, which is its distance from the teacher: the
    noise may be a tenth of that, or `rounding` of the answer where they hardly differ. Sizes are root mean squares.

    Args:
        scales: of all teachers by name.
        tried: names, one of every server.
        shape: of a latent.
        student: its velocity at latents [1, *latent] and a sigma, on the CPU.

    Returns:
        The largest difference seen, relative to what is accepted.

    Raises:
        RefusedError: the answers of one differ by more: replicas are not equal, or a batch changes its rows.
    """
    row = draw(shape, "teacher self-test").unsqueeze(0)
    other = draw((max(_BATCHES), *shape), "teacher self-test, others")

    def ask(teacher: str, size: int) -> "Future[Tensor]":
        latents = torch.cat([row, other[1:size]])
        sigmas, rows = torch.linspace(_SIGMA, 0.1, size), torch.tensor([scales[teacher]] * size)
        return client.submit(teacher, latents, sigmas, rows, [conditioning] * size, negative)

    alone = {teacher: ask(teacher, 1).result()[0] for teacher in scales}
    futures = {teacher: [ask(teacher, 1)] for teacher in scales}
    for teacher in tried:
        futures[teacher] += [ask(teacher, size) for size in (*[1] * (_CONCURRENT - 1), *_BATCHES)]
    of_student = student(row, _SIGMA)[0]
    return max(
        _share(teacher, alone[teacher], [future.result()[0] for future in answers], of_student, rounding)
        for teacher, answers in futures.items()
    )


def _share(teacher: str, alone: Tensor, answers: Sequence[Tensor], student: Tensor, rounding: float) -> float:
    """The largest difference of a teacher's answers, relative to what is accepted."""
    worst = max(_size(answer - alone) for answer in answers)
    distance = _size(student - alone)
    accepted = max(_NOISE * distance, rounding * _size(alone), 1e-6)
    if worst > accepted:
        raise RefusedError(
            f"teacher {teacher} answers one state differently by {worst:.2g} alone, concurrently and in batches; its "
            f"distance from the student is {distance:.2g}, and {accepted:.2g} is accepted: its replicas differ, or its "
            "arithmetic depends on the batch; try teacherServing.precision FP32"
        )
    return worst / accepted


def _size(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
