"""API keys: the server holds digests, never the keys."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from opd_core.errors import InvalidError

from opd_serving.endpoint.errors import ApiError


def read_keys(file: Path) -> tuple[str, ...]:
    """SHA-256 digests (hex), one per line, as `printf %s "$KEY" | sha256sum` prints them; `#` starts a comment.

    Raises:
        InvalidError: unreadable, without any key, or a line that is no digest. The line is not shown: it may be a key.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"--api-keys {file} cannot be read: {error}") from error
    digests = []
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].split()[:1]
        if not word:
            continue
        digest = word[0].removeprefix("sha256:").lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise InvalidError(
                f"--api-keys {file}, line {number} does not start with a SHA-256 digest; "
                'write what this prints: printf %s "$KEY" | sha256sum'
            )
        digests.append(digest)
    if not digests:
        raise InvalidError(f"--api-keys {file} holds no key; leave --api-keys out to serve everybody")
    return tuple(digests)


def require_key(authorization: str | None, digests: Sequence[str]) -> None:
    """Raises the 401 for a missing or unknown key. All digests are compared, each in constant time."""
    scheme, _, key = (authorization or "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
    known = [hmac.compare_digest(given, digest) for digest in digests]
    if scheme.lower() != "bearer" or not any(known):
        raise ApiError(
            401,
            "no API key; send the header Authorization: Bearer KEY"
            if not authorization
            else "this API key is not known",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
