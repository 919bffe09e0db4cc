"""Exit codes of every program: the one table that the CLI, the pods and the operator's failure policy share."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process says with its last number."""

    OK = 0
    INTERNAL = 1  # a defect of ours, with a stack trace
    INVALID = 2  # spec, prompts, adapter or arguments: the user must change something
    REFUSED = 3  # what was found is not what the spec asked for: fingerprint, self-test, a teacher's non-finite answer
    GATE = 4  # the student was trained and evaluated but missed its gate
    DIVERGED = 5  # non-finite loss or exploding gradient
    OUT_OF_MEMORY = 6  # a device has too little memory for what the spec asks of it; the same again would fail again
    STORAGE = 74  # disk full or not writable (EX_IOERR)
    UNAVAILABLE = 75  # a peer could not be reached within its retries (EX_TEMPFAIL)
    INTERRUPTED = 130  # Ctrl-C
    TERMINATED = 143  # SIGTERM, after a checkpoint

    @property
    def retryable(self) -> bool:
        """Whether the same command may be started again without a change."""
        return self in (ExitCode.UNAVAILABLE, ExitCode.TERMINATED)
