"""Requests to one API server as plain data, through the official client; its refusals come back in our words."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import TOO_MANY_REQUESTS
from typing import Any
from urllib.parse import quote

from opd_core.errors import OPDError, UnavailableError
from opd_operator import names

from opd_cli.cluster.refusals import refusal

MANAGER = "opd-cli"  # of server-side apply: the owner of every field in a submitted file
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
# Not done, says the server, and when to ask again: it is busy, or has just learnt of a type. kubectl asks again, too.
_TRIES, _LONGEST_PAUSE = 5, 10  # seconds
JSON, TABLE = "application/json", "application/json;as=Table;v=v1;g=meta.k8s.io"


@dataclass(frozen=True)
class Connection:
    """Args: namespace: the context's own. flags: what to say on a command line to come here again.
    timeout: seconds of one request."""

    api: Any  # kubernetes.client.ApiClient
    namespace: str
    flags: str = ""
    timeout: float = 30.0

    @property
    def host(self) -> str:
        return str(self.api.configuration.host)

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> dict[str, Any]:
        """What the API server answers.

        Raises:
            RejectedError: it says no. UnavailableError: it does not answer.
        """
        with self.explained():
            headers = {"Content-Type": content_type, "Accept": accept}
            response = self._send(method, path, query or {}, headers, body, self.timeout)
            content: dict[str, Any] = json.loads(response.read())
        return content

    def lines(self, path: str, query: Mapping[str, str], silence: float | None) -> "Lines":
        """The lines of an answer as they come. `silence`: seconds without one that are no answer; None: no limit."""
        with self.explained():
            headers = {"Accept": f"{JSON}, */*"}
            return Lines(self, self._send("GET", path, query, headers, None, (self.timeout, silence)).response)

    def _send(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], body: Any, timeout: Any
    ) -> Any:
        request = self.api.param_serialize(
            method,
            path,
            query_params=[(name, value) for name, value in query.items() if value],
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        for tries_left in reversed(range(_TRIES)):
            response = self.api.rest_client.request(
                request[0], request[1], headers=request[2], body=request[3], _request_timeout=timeout
            )
            if response.status < 300:
                return response
            said, pause = response.read().decode(errors="replace"), response.headers.get("Retry-After", "")
            if response.status != TOO_MANY_REQUESTS or not pause.isdecimal() or not tries_left:
                break
            time.sleep(min(int(pause), _LONGEST_PAUSE))
        raise refusal(response.status, said, self.host)

    @contextmanager
    def explained(self) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except OPDError:
            raise
        except (HTTPError, ApiException, OSError, ValueError) as error:
            cause = getattr(error, "reason", None) or error  # what urllib3 or the client wraps
            raise UnavailableError(
                f"{self.host} does not answer as an API server does: {cause}; check the address in the kubeconfig, "
                "and whether the cluster runs"
            ) from error


class Lines:
    """Iterate, then close, in this thread or another."""

    def __init__(self, connection: Connection, response: Any) -> None:
        self._connection, self._response = connection, response
        self._read = False

    def __iter__(self) -> Iterator[str]:
        rest = b""
        self._read = True
        with self._connection.explained(), closing(self._response):
            for chunk in self._response.stream():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        if rest:
            yield rest.decode(errors="replace")

    def close(self) -> None:
        with suppress(RuntimeError, ValueError):  # it has come to its end by itself
            self._response.shutdown()  # wakes a reader in another thread; close alone would wait for it
        if not self._read:  # its reader closes it: a reader whose response vanishes meets an AttributeError
            self._response.close()


def distillations(namespace: str = "", name: str = "") -> str:
    """Path of one object, of those in a namespace, or of all."""
    return _path(f"/apis/{names.GROUP}/{names.VERSION}", namespace, names.PLURAL, name)


def core(namespace: str, plural: str, name: str = "", subresource: str = "") -> str:
    """Path of pods, events and other objects of v1."""
    return _path("/api/v1", namespace, plural, name, subresource)


def _path(root: str, namespace: str, *parts: str) -> str:
    where = ["namespaces", namespace] if namespace else []
    return "/".join([root, *(quote(part, safe="") for part in (*where, *parts) if part)])
