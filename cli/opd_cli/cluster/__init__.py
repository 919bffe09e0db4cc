"""Distillations in a cluster: `Distillations` for notebooks, and the commands of `opd` that are thin over it."""

from opd_core.api.load import SpecError
from opd_core.errors import OPDError

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.events import Event
from opd_cli.cluster.logs import LogLine, Role
from opd_cli.cluster.refusals import NotFoundError, RejectedError
from opd_cli.cluster.submission import Submission

__all__ = [
    "Distillation", "Distillations", "Event", "LogLine", "NotFoundError", "OPDError", "RejectedError", "Role",
    "SpecError", "Submission",
]  # fmt: skip
