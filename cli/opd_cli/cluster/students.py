"""The students of one object: by digest or its beginning, and the one to roll back to. Pure."""

import re

from opd_core.api.status import PublishedStudent
from opd_core.errors import InvalidError

from opd_cli.cluster.distillation import Distillation

_SHORTEST = 7  # hexadecimal digits of an abbreviated digest


def short(digest: str | None) -> str:
    """A digest as people write it, long enough for `find`."""
    return (digest or "")[: len("sha256:") + 12]


def known(distillation: Distillation) -> list[PublishedStudent]:
    """Oldest first, with the newest, which may not be evaluated yet."""
    status = distillation.status
    students = list(status.students or [])
    if status.student and status.student.digest and status.student.digest not in [each.digest for each in students]:
        newest = status.student
        students.append(PublishedStudent(digest=newest.digest or "", key=newest.key, uri=newest.uri))
    return students


def find(distillation: Distillation, digest: str) -> PublishedStudent:
    """The student whose digest begins with `digest`.

    Raises:
        InvalidError: none, or more than one.
    """
    students = known(distillation)
    listed = ", ".join(short(each.digest) for each in students) or "none yet"
    start = digest.removeprefix("sha256:")
    if not re.fullmatch(f"[0-9a-f]{{{_SHORTEST},64}}", start):
        raise InvalidError(
            f"{digest}: not the beginning of a digest; write {_SHORTEST} hexadecimal digits or more of one of {listed}"
        )
    found = [each for each in students if each.digest.removeprefix("sha256:").startswith(start)]
    if len(found) != 1:
        what = "no student" if not found else f"{len(found)} students"
        raise InvalidError(f"{digest}: {what} of {distillation.name}; write more of one of {listed}")
    return found[0]


def before(distillation: Distillation) -> PublishedStudent:
    """The student to roll back to: the one that a rollout replaces, else the last one before it that was in service.

    Raises:
        InvalidError: there is none.
    """
    students, endpoint = known(distillation), distillation.status.endpoint
    if endpoint is None or endpoint.stable is None or endpoint.stable.digest is None:
        raise InvalidError(f"{distillation.name} serves no student, so there is nothing to roll back")
    serving = endpoint.stable.digest
    if endpoint.canary:
        if endpoint.canary.digest == serving:
            raise InvalidError(
                f"the rollout of {distillation.name} changes spec.endpoint, not the student; "
                "submit the spec.endpoint that was there before"
            )
        return find(distillation, serving)
    digests = [each.digest for each in students]
    earlier = students[: digests.index(serving)] if serving in digests else students
    served = [each for each in earlier if each.served]
    if not served:
        listed = ", ".join(short(each) for each in digests)
        raise InvalidError(
            f"{distillation.name} has no student before {short(serving)} that was in service; "
            f"`opd promote {distillation.name} DIGEST` serves any of {listed}"
        )
    return served[-1]
