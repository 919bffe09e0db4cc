"""Errors that a user sees. `str(error)` is the whole message: what, where, which value, and what to do about it."""

from typing import ClassVar

from opd_core.exit_codes import ExitCode


class OPDError(Exception):
    """Base of all errors that end a program with a message instead of a stack trace."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


class InvalidError(OPDError):
    """The user's input cannot be used: spec, prompts, adapter, argument."""

    exit_code = ExitCode.INVALID


class RefusedError(OPDError):
    """What was found is not what was asked for: another model behind the address, a teacher that answers NaN."""

    exit_code = ExitCode.REFUSED


class GateError(OPDError):
    """The student missed its gate."""

    exit_code = ExitCode.GATE


class DivergedError(OPDError):
    """The loss or the gradient left the finite numbers."""

    exit_code = ExitCode.DIVERGED


class OutOfMemoryError(OPDError):
    """A device has too little memory; the message names the field that makes the work smaller."""

    exit_code = ExitCode.OUT_OF_MEMORY


class StorageError(OPDError):
    """A file could not be written."""

    exit_code = ExitCode.STORAGE


class UnavailableError(OPDError):
    """A peer could not be reached within its retries; the same command may work later."""

    exit_code = ExitCode.UNAVAILABLE
