"""How a rank's program ends: with a message and an exit code for what was expected, with a stack trace for the rest."""

import sys
import traceback
from collections.abc import Callable

from opd_core.device import is_out_of_memory
from opd_core.errors import OPDError, OutOfMemoryError
from opd_core.exit_codes import ExitCode
from opd_core.termination import last_words

from opd_trainer.engine import is_peer_loss


def run_rank(program: Callable[[], int], *, smaller: str, debug: bool = False) -> int:
    """Exit code of `program`, whatever it raises; its last words say why.

    Args:
        smaller: which fields of the spec make the work smaller, for a device with too little memory.
        debug: show stack traces of expected errors, too.
    """
    try:
        return program()
    except OPDError as error:
        if debug:
            traceback.print_exc()
        return _told(error)
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            return _told(OutOfMemoryError(f"a device has too little memory: {smaller}. It said: {error}"))
        if is_peer_loss(error):
            message = f"another rank was lost or did not answer in time: {error}; start again to continue"
            last_words(ExitCode.UNAVAILABLE, message)
            return ExitCode.UNAVAILABLE
        last_words(ExitCode.INTERNAL, f"{type(error).__name__}: {error}")
        return ExitCode.INTERNAL


def _told(error: OPDError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    last_words(error.exit_code, str(error))
    return error.exit_code
