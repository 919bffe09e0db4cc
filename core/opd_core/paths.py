"""Paths for programs that hand them to a shell."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_core.errors import InvalidError

_SAFE = re.compile(r"[A-Za-z0-9_./+=:@%,-]*")


def is_shell_safe(path: Path) -> bool:
    """Whether a shell reads the path as it is, also where nobody has quoted it."""
    return _SAFE.fullmatch(str(path)) is not None


@contextmanager
def shell_safe(path: Path) -> Iterator[Path]:
    """`path`, or a link to it that has no blank, bracket or `$`, for as long as the context.

    Triton's Python backend starts its stub with `bash -c "exec stub path ..."` and quotes nothing
    (https://github.com/triton-inference-server/python_backend/issues/401).

    Raises:
        InvalidError: the folder for temporary files has such a character, too.
    """
    if is_shell_safe(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="opd-") as folder:
        if not is_shell_safe(Path(folder)):
            raise InvalidError(
                f"{path} has characters that mean something to a shell, and so has the folder for temporary files, "
                f"{tempfile.gettempdir()}; set TMPDIR to one that has none"
            )
        link = Path(folder, "work")
        link.symlink_to(path)
        yield link
