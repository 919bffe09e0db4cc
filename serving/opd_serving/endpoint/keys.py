"""API keys: the server holds digests, never the keys, and follows the file that they stand in."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

from opd_core.errors import InvalidError

from opd_serving.endpoint.errors import ApiError

_LOOK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class KeyFile:
    """The keys of a file as it is now: a rotated Secret, or an edited file, counts within a second, without a restart.

    Raises:
        InvalidError: the file cannot be read when the server starts. Later, the keys from before go on to count.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._looked = path, time.monotonic()
        self._stamp, self._keys = _stamp(path), read_keys(path)

    def owner(self, authorization: str | None) -> str:
        """Whose key it is; raises the 401 for a missing or unknown one. All digests are compared, each in constant
        time."""
        scheme, _, key = (authorization or "").partition(" ")
        # Headers come as latin-1, whatever the client wrote.
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
        found = [name for digest, name in self._current().items() if hmac.compare_digest(given, digest)]
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401,
                "no API key; send the header Authorization: Bearer KEY"
                if not authorization
                else "this API key is not known",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]

    def _current(self) -> Mapping[str, str]:
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            if (stamp := _stamp(self._path)) != self._stamp:
                self._stamp = stamp
                try:
                    self._keys = read_keys(self._path)
                    _log.info("%d API keys are read again from %s", len(self._keys), self._path)
                except InvalidError as error:
                    _log.error("the API keys from before go on to count: %s", error)
        return self._keys


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()  # follows the links that Kubernetes exchanges under a mounted Secret
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_keys(file: Path) -> dict[str, str]:
    """Names of the keys by SHA-256 digest (hex): one key a line, the digest as `printf %s "$KEY" | sha256sum` prints
    it, then its owner's name; keys with one name share one turn in the queue. `#` starts a comment.

    Raises:
        InvalidError: unreadable, without any key, or a line that is no digest. The line is not shown: it may be a key.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"--api-keys {file} cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        digest = words[0].removeprefix("sha256:").lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise InvalidError(
                f"--api-keys {file}, line {number} does not start with a SHA-256 digest; "
                'write what this prints: printf %s "$KEY" | sha256sum'
            )
        name = " ".join(words[1:]).removeprefix("*").removeprefix("-").strip()
        if not name.isprintable() or len(name) > 64:
            raise InvalidError(f"--api-keys {file}, line {number}: a key's name has at most 64 printable characters")
        names[digest] = name or f"key-{number}"
    if not names:
        raise InvalidError(f"--api-keys {file} holds no key; leave --api-keys out to serve everybody")
    return names
