"""The states of one object as they come."""

import json
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from opd_core.errors import UnavailableError

from opd_cli.cluster.connection import Connection, distillations
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.refusals import NotFoundError

_WATCH_SECONDS = 240  # of one request; then the list is read again, so that a lost event is lost for no longer
_PATIENCE_SECONDS = 60.0  # with an API server that does not answer
_PAUSE_SECONDS = 1.0


def follow(
    connection: Connection, namespace: str, name: str, timeout: float | None
) -> Generator[Distillation, None, None]:
    """The object as it is, then after each change, until `timeout` seconds have passed; close it to stop earlier.

    Raises:
        NotFoundError: it is not there, or no longer. UnavailableError: the API server is gone for a minute.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    lost, seen = math.inf, ""
    while True:
        try:
            for state in _states(connection, namespace, name, end):
                lost = math.inf
                if (version := state.manifest["metadata"]["resourceVersion"]) != seen:
                    seen = version
                    yield state
        except UnavailableError:
            now = time.monotonic()
            lost = min(lost, now)
            if now - lost > _PATIENCE_SECONDS or (now >= end and not seen):
                raise
            time.sleep(max(0.0, min(_PAUSE_SECONDS, end - now)))
        if time.monotonic() >= end:
            return


def _states(connection: Connection, namespace: str, name: str, end: float) -> Iterator[Distillation]:
    """One list and the watch after it. A list: the version of an old object alone is too old to watch from."""
    path, only = distillations(namespace), {"fieldSelector": f"metadata.name={name}"}
    seconds = max(0.1, min(_WATCH_SECONDS, end - time.monotonic()))
    connection = replace(connection, timeout=min(connection.timeout, seconds))
    page = connection.request("GET", path, only)
    if not page["items"]:
        raise NotFoundError(f"no {name} in namespace {namespace}")
    yield Distillation(page["items"][0])
    query = {
        **only,
        "watch": "true",
        "resourceVersion": page["metadata"]["resourceVersion"],
        "timeoutSeconds": str(math.ceil(seconds)),
    }
    silence = seconds + 10 if seconds == _WATCH_SECONDS else seconds
    with closing(connection.lines(path, query, silence)) as lines:
        for line in lines:
            event: dict[str, Any] = json.loads(line)
            if event["type"] == "ERROR":
                raise UnavailableError(f"{connection.host}: {event['object'].get('message')}")
            if event["type"] == "DELETED":
                raise NotFoundError(f"{name} in namespace {namespace} was deleted")
            yield Distillation(event["object"])
