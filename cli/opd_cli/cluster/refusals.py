"""What an API server says when it does not do something, in our words: what, where, which value, what to do. Pure."""

import json
import re
from dataclasses import dataclass
from typing import Any

from opd_core.api.types import API_VERSION, KIND
from opd_core.errors import InvalidError, OPDError, UnavailableError

INSTALL = "helm install diffusion-opd charts/diffusion-opd --namespace opd-system --create-namespace"
_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_READS = ("get", "list", "watch")


class RejectedError(InvalidError):
    """The API server says no; asking again does not help."""


class NotFoundError(RejectedError):
    """No such object."""


@dataclass(frozen=True)
class Claim:
    """A field that another manager has set: `path` as .spec.suspend."""

    path: str
    manager: str


class ConflictError(RejectedError):
    """Fields of an applied object are set by others."""

    def __init__(self, claims: list[Claim]) -> None:
        self.claims = claims
        super().__init__("; ".join(f"{claim.path} is set by {claim.manager}" for claim in claims))


def refusal(status: int, body: str, host: str) -> OPDError:
    """The error for an answer of the API server at `host`.

    Args:
        status: of HTTP, 400 or more. body: a Status object as JSON, or what something else answered.
    """
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    said: dict[str, Any] = content if isinstance(content, dict) else {}
    message = str(said.get("message") or body.strip()[:200] or f"HTTP status {status}")
    causes: list[dict[str, str]] = (said.get("details") or {}).get("causes") or []
    if status == 401:
        return RejectedError(f"{host} does not accept these credentials; log in again, or choose another --context")
    if status == 403 and (found := _FORBIDDEN.search(message)):
        return RejectedError(_forbidden(found))
    if status == 404 and not said:
        return RejectedError(f"{host} has no type {KIND} ({API_VERSION}); install the operator: {INSTALL}")
    if status == 404:
        return NotFoundError(message)
    if status == 409 and causes:
        return ConflictError([Claim(cause["field"], _manager(cause["message"])) for cause in causes])
    if status == 422 and causes:
        return RejectedError(_problems(causes))
    if "not declared in schema" in message:
        field = message.rpartition(": ")[0].rpartition(": ")[2].lstrip(".")
        return RejectedError(
            f"{field}: the type {KIND} in the cluster has no such field, because it is older than this opd; upgrade "
            "it with helm upgrade, or leave the field out"
        )
    if status == 429 or status >= 500:
        return UnavailableError(f"{host}: {message}; try again")
    return RejectedError(message)


def _forbidden(found: re.Match[str]) -> str:
    user, verb, namespace = found["user"], found["verb"], found["namespace"]
    resource = ".".join(part for part in (found["resource"], found["group"]) if part)
    role = "view" if verb in _READS and found["resource"] != "pods/exec" else "edit"
    where = f"in namespace {namespace}" if namespace else "in all namespaces"
    binding = f"rolebinding opd-{role} --namespace={namespace}" if namespace else f"clusterrolebinding opd-{role}"
    return (
        f"{user} may not {verb} {resource} {where}; an administrator allows it with: "
        f"kubectl create {binding} --clusterrole={role} --user={user}"
    )


def _manager(message: str) -> str:
    found = re.search(r'conflict with "([^"]+)"', message)
    return found[1] if found else message


def _problems(causes: list[dict[str, str]]) -> str:
    lines = [f"  {cause.get('field', '(object)')}: {_sentence(cause['message'])}" for cause in causes]
    lines = list(dict.fromkeys(lines))  # some are said twice
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"the API server refuses it: {count}", *lines])


def _sentence(message: str) -> str:
    """A rule of ours has the value in its own words."""
    return message.removeprefix("Invalid value: ")
