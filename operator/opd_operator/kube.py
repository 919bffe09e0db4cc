"""The few requests that the operator makes, through the official client's asyncio side, as plain data."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import Any

from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from opd_core.api.types import KIND
from pydantic_core import from_json

from opd_operator import names
from opd_operator.metrics import ApiMetrics

_TIMEOUT = 30.0  # seconds of one request
PAGE = 20  # objects in an answer: one takes some 50 kB parsed, and 3 MiB if somebody makes it as large as it may be

APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
PATCH = "application/json-patch+json"
_FOREIGN = "Foreign"  # reason of a refusal that is our own
_LONGEST_PAUSE = 300.0  # seconds that an answer may ask us to wait
_CLOCK = 86_400.0  # seconds: a clock that is further off than this is none (a certificate would not hold either)


@dataclass(frozen=True)
class Resource:
    """Where a kind lives in the API."""

    kind: str
    api_version: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = "/api/v1" if self.api_version == "v1" else f"/apis/{self.api_version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


DISTILLATION = Resource(KIND, f"{names.GROUP}/{names.VERSION}", names.PLURAL)
POD = Resource("Pod", "v1", "pods")
CLAIM = Resource("PersistentVolumeClaim", "v1", "persistentvolumeclaims")  # whose access modes are read
OWNED = (
    Resource("ServiceAccount", "v1", "serviceaccounts"),
    Resource("ConfigMap", "v1", "configmaps"),
    Resource("Service", "v1", "services"),
    Resource("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies"),
    Resource("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets"),
    Resource("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers"),
    Resource("Deployment", "apps/v1", "deployments"),
    Resource("Job", "batch/v1", "jobs"),
)
ROUTE = Resource("HTTPRoute", "gateway.networking.k8s.io/v1", "httproutes")  # where the Gateway API is installed
_MANAGER = {"fieldManager": names.MANAGER}
EVENT = Resource("Event", "v1", "events")
BY_KIND = {resource.kind: resource for resource in (DISTILLATION, POD, *OWNED, ROUTE)}


class ApiError(Exception):
    """What the API server answered instead of doing it."""

    def __init__(
        self, status: int, reason: str, message: str, causes: tuple[str, ...] = (), retry_after: float = 0.0
    ) -> None:
        self.status, self.reason, self.message, self.causes = status, reason, message, causes
        self.retry_after = retry_after  # seconds, as the server asks
        super().__init__(f"{status} {reason}: {message}")

    @property
    def not_found(self) -> bool:
        return self.status == 404

    @property
    def conflict(self) -> bool:
        return self.status == 409 and not self.foreign

    @property
    def foreign(self) -> bool:
        """An object of this name is somebody else's."""
        return self.reason == _FOREIGN

    @property
    def refused(self) -> bool:
        """A rule of the cluster says no: quota, admission, permission, schema, a webhook that does not answer; or the
        name is taken."""
        webhook = self.status == 500 and "failed calling webhook" in self.message
        return self.status in (400, 403, 422) or webhook or self.foreign

    @property
    def namespace_terminating(self) -> bool:
        return "NamespaceTerminating" in self.causes


@dataclass
class Kube:
    client: ApiClient
    metrics: ApiMetrics = field(default_factory=ApiMetrics)
    _ahead: float = 0.0  # seconds by which the API server's clock is ahead of ours

    def now(self) -> float:
        """Seconds since 1970 on the API server's clock: the one that two operators on two nodes have in common."""
        return time.time() + self._ahead

    async def has(self, resource: Resource) -> bool:
        """Whether the cluster knows this kind."""
        try:
            group = await self._request("GET", resource, f"/apis/{resource.api_version}", {})
        except ApiError as error:
            if error.not_found:
                return False
            raise
        return any(each["name"] == resource.plural for each in group["resources"])

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        return await self._request("GET", resource, resource.path(namespace, name), {})

    async def pages(self, resource: Resource, namespace: str = "", selector: str = "") -> AsyncIterator["Page"]:
        """All objects, of which only a page is in memory."""
        following = ""
        while True:
            query = {"limit": str(PAGE), "labelSelector": selector, "continue": following}
            content = await self._request("GET", resource, resource.path(namespace), query)
            following = content["metadata"].get("continue", "")
            kind = {"apiVersion": resource.api_version, "kind": resource.kind}
            yield Page([{**kind, **item} for item in content["items"]], int(content["metadata"]["resourceVersion"]))
            if not following:
                return

    async def apply(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make what the manifest says so. One with a uid is about that very object, and overrules whoever set something
        before; one without is about an object that is not there yet, and one that is there is left alone.

        Raises:
            ApiError: also `foreign`, where an object of this name belongs to somebody else.
        """
        resource, target = BY_KIND[manifest["kind"]], manifest["metadata"]
        if "uid" not in target:
            return await self._create(resource, manifest)
        await self._take_over(resource, target)
        path, query = resource.path(target["namespace"], target["name"]), {**_MANAGER, "force": "true"}
        return await self._request("PATCH", resource, path, query, manifest, content_type=APPLY)

    async def _create(self, resource: Resource, manifest: Mapping[str, Any]) -> dict[str, Any]:
        target, (owner,) = manifest["metadata"], manifest["metadata"]["ownerReferences"]
        try:
            return await self._request("POST", resource, resource.path(target["namespace"]), _MANAGER, manifest)
        except ApiError as error:
            if not error.conflict:
                raise
            found = await self._find(resource, target)
            owners = (found or {}).get("metadata", {}).get("ownerReferences") or []
            if found and any(each["uid"] == owner["uid"] for each in owners):
                return found  # made by a look whose answer was lost
            earlier = any((each["kind"], each["name"]) == (owner["kind"], owner["name"]) for each in owners)
            if found is None or earlier or "deletionTimestamp" in found["metadata"]:
                raise  # on its way out
            text = "an object of this name is there already and is somebody else's; rename one of the two"
            raise ApiError(error.status, _FOREIGN, text) from error

    async def _find(self, resource: Resource, target: Mapping[str, str]) -> dict[str, Any] | None:
        """By a list of one, for which no further right is needed."""
        query = {"fieldSelector": f"metadata.name={target['name']}"}
        items = (await self._request("GET", resource, resource.path(target["namespace"]), query))["items"]
        return next(iter(items), None)

    async def _take_over(self, resource: Resource, target: Mapping[str, str]) -> None:
        """What was set when the object was created counts as applied from now on: else what a later manifest leaves out
        would stay, since server-side apply sees two managers of it (client-go's csaupgrade does the same)."""
        metadata = (await self._find(resource, target) or {}).get("metadata", {})
        managers = metadata.get("managedFields") or []
        created = [
            m
            for m in managers
            if (m["manager"], m["operation"], "subresource" in m) == (names.MANAGER, "Update", False)
        ]
        if not created:
            return
        fields = [{**each, "operation": "Apply"} if each in created else each for each in managers]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "managedFields": fields}}
        path = resource.path(target["namespace"], target["name"])
        await self._request("PATCH", resource, path, _MANAGER, body, content_type=MERGE)

    async def write_status(self, obj: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the whole status: whatever anybody else has put there goes.

        Raises:
            ApiError: `conflict` if `obj` is not the newest.
        """
        metadata = obj["metadata"]
        path = DISTILLATION.path(metadata["namespace"], metadata["name"], "status")
        version = {"op": "replace", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]}
        body = [version, {"op": "add", "path": "/status", "value": status}]
        return await self._request("PATCH", DISTILLATION, path, _MANAGER, body, content_type=PATCH)

    async def delete(self, obj: Mapping[str, Any]) -> None:
        """Delete exactly this object with all that it owns, a Job after its pods; one that is gone already is fine."""
        resource, target = BY_KIND[obj["kind"]], obj["metadata"]
        policy = "Foreground" if obj["kind"] == "Job" else "Background"
        options = {"propagationPolicy": policy, "preconditions": {"uid": target["uid"]}}
        try:
            path = resource.path(target["namespace"], target["name"])
            await self._request("DELETE", resource, path, {}, options)
        except ApiError as error:
            if not (error.not_found or error.conflict):  # conflict: another one by now
                raise

    async def record(self, event: Mapping[str, Any]) -> None:
        """Make an event, or bring one of this name up to date."""
        metadata, fresh = event["metadata"], {key: event[key] for key in ("count", "message", "lastTimestamp")}
        try:
            await self._request("POST", EVENT, EVENT.path(metadata["namespace"]), {}, event)
        except ApiError as error:
            if not error.conflict:
                raise
            path = EVENT.path(metadata["namespace"], metadata["name"])
            await self._request("PATCH", EVENT, path, {}, fresh, content_type=MERGE)

    async def _request(
        self,
        method: str,
        resource: Resource,
        path: str,
        query: Mapping[str, str],
        body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        request = await self.client.param_serialize(
            method,
            path,
            query_params=[(name, value) for name, value in query.items() if value],
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        began, code = time.monotonic(), "error"
        try:
            response = await self.client.rest_client.request(
                request[0], request[1], headers=request[2], body=request[3], _request_timeout=_TIMEOUT
            )
            code, body_ = str(response.status), await response.read()
        finally:
            self.metrics.called(method, resource.plural, code, time.monotonic() - began)
        if date := response.headers.get("Date"):
            self._ahead = _ahead(date, self._ahead)
        if response.status >= 300:
            raise _error(response.status, response.headers.get("Retry-After", ""), body_)
        content: dict[str, Any] = json.loads(body_)
        return content


def _error(status: int, retry_after: str, body: bytes) -> ApiError:
    """Also of an answer that is no Status object: a proxy's page, the plain text of an overloaded server."""
    pause = min(float(retry_after), _LONGEST_PAUSE) if retry_after.isdecimal() else 0.0
    try:
        content = from_json(body)  # not json.loads: a proxy's page may be nested without end
        causes = (content.get("details") or {}).get("causes") or []
        reasons = tuple(cause.get("reason", "") for cause in causes)
        return ApiError(status, content.get("reason", ""), content.get("message", ""), reasons, pause)
    except (ValueError, AttributeError):
        return ApiError(status, "", body[:200].decode(errors="replace").strip(), (), pause)


def _ahead(date: str, known: float) -> float:
    """Seconds by which the API server is ahead of our clock, from a Date header and what was known. A header has whole
    seconds and takes its time: a few seconds count as none, and fewer are no news, so that the clock does not jump."""
    try:
        ahead = parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return known  # no date: a proxy's
    if abs(ahead - known) <= 4 or abs(ahead) > _CLOCK:
        return known
    return ahead if abs(ahead) > 5 else 0.0


@dataclass(frozen=True)
class Page:
    items: list[dict[str, Any]]
    version: int  # of the whole list


@asynccontextmanager
async def connect(connections: int) -> AsyncIterator[ApiClient]:
    """A client from the pod's service account, else from the kubeconfig."""
    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    configuration.connection_pool_maxsize = connections
    configuration.retries = 0  # the queue repeats, with its own pauses
    async with ApiClient(configuration) as client:
        client.user_agent = f"{names.MANAGER}/{metadata.version('diffusion-opd')}"
        yield client
