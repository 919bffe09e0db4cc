"""What the cluster shows: child objects as the API server has them, reduced to what decisions need. No I/O."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from opd_core.stages import Reason

from opd_operator.claims import Modes
from opd_operator.names import COMPLETION_INDEX, CONTAINERS, REVISION, ROLE, SHARED, TEACHER
from opd_operator.words import Progress, Words, printable, words

Object = Mapping[str, Any]


@dataclass(frozen=True)
class PodView:
    name: str
    role: str
    index: int
    phase: str
    message: str
    ready: bool
    ip: str
    disrupted: bool
    ended: Words | None  # of our own container
    before: Words | None  # of our own container before its last restart
    failed: Words | None  # of another container, one that somebody put there, that has failed
    held: str  # another container that keeps the pod although ours has ended
    trouble: tuple[Reason, str] | None  # why it does not run
    restarts: int
    job: str
    teacher: str  # that it trains
    revision: str

    @property
    def active(self) -> bool:
        """Whether it holds what it asked for, leaving or not."""
        return self.phase in ("Pending", "Running")

    @property
    def queued(self) -> bool:
        """Whether a queue has not let it in yet."""
        return self.trouble is not None and self.trouble[0] == Reason.QUEUED


@dataclass(frozen=True)
class JobView:
    name: str
    role: str
    teacher: str  # that it trains
    created: str
    pods: int  # that it shall have
    active: int
    ready: int
    succeeded: int
    failed: int
    complete: bool
    over: bool  # failed, and its pods have ended
    suspended: bool  # by a queue such as Kueue: we never do it
    message: str

    @property
    def finished(self) -> bool:
        return self.complete or self.over


@dataclass(frozen=True)
class DeploymentView:
    name: str
    role: str
    replicas: int
    ready: int
    available: bool
    revision: str
    trouble: tuple[Reason, str] | None  # why it makes no pods


@dataclass(frozen=True)
class Requests:
    """Images that a canary's pods have made since they started, and failures of theirs; `total` has both."""

    failed: int
    total: int


@dataclass(frozen=True)
class Observed:
    """The children of one object, and what was asked of its pods."""

    jobs: Mapping[str, JobView] = field(default_factory=dict)
    deployments: Mapping[str, DeploymentView] = field(default_factory=dict)
    pods: tuple[PodView, ...] = ()
    unrouted: str = "its HTTPRoute is not there yet"  # why no gateway sends requests through the route, if none does
    followed: bool = True  # whether a gateway's controller has taken the route as it is now
    progress: Progress | None = None  # of the trainer's port
    taught: Mapping[str, Progress] = field(default_factory=dict)  # by teacher that is trained, of its trainer's port
    requests: Requests | None = None  # to the canary; None if none of its pods tells
    rejected: Mapping[str, str] = field(default_factory=dict)  # by role: why an object of its was refused last time
    claims: Modes = field(default_factory=dict)  # of those that were asked for

    def pods_of(self, role: str, teacher: str = "") -> list[PodView]:
        """Of a role, or of one teacher that is trained."""
        return [pod for pod in self.pods if pod.role == role and teacher in ("", pod.teacher)]

    def jobs_of(self, role: str, teacher: str = "") -> list[JobView]:
        return [job for job in self.jobs.values() if job.role == role and teacher in ("", job.teacher)]

    def active(self, *roles: str) -> list[PodView]:
        return [pod for pod in self.pods if pod.role in roles and pod.active]

    def trouble(self, role: str, teacher: str = "") -> tuple[Reason, str] | None:
        """Why a role does not come up: what was refused, else its first pod, by name, that has something to say."""
        if refusal := self.rejected.get(role) or self.rejected.get(SHARED):
            return Reason.REJECTED, refusal
        pods = sorted(self.pods_of(role, teacher), key=lambda pod: pod.name)
        said = [pod.trouble for pod in pods] + [each.trouble for each in self.deployments.values() if each.role == role]
        return next((trouble for trouble in said if trouble), None)


def observe(
    children: Iterable[Object],
    progress: Progress | None = None,
    requests: Requests | None = None,
    rejected: Mapping[str, str] = MappingProxyType({}),
    claims: Modes = MappingProxyType({}),
    taught: Mapping[str, Progress] = MappingProxyType({}),
) -> Observed:
    """Views of `children`, whatever their kind. Every text in them may be shown."""
    jobs, deployments, pods, unrouted, followed = {}, {}, [], Observed.unrouted, Observed.followed
    for child in children:
        if child["kind"] == "Job":
            view = _job(child)
            jobs[view.name] = view
        elif child["kind"] == "Deployment":
            deployment = _deployment(child)
            deployments[deployment.name] = deployment
        elif child["kind"] == "Pod":
            pods.append(_pod(child))
        elif child["kind"] == "HTTPRoute":
            unrouted, followed = _unrouted(child), _followed(child)
    refusals = {role: printable(why) for role, why in rejected.items()}
    return Observed(
        jobs, deployments, tuple(pods), printable(unrouted), followed, progress, taught, requests, refusals, claims
    )


def _told(reason: Reason, message: str) -> tuple[Reason, str]:
    return reason, printable(message)


def _job(job: Object) -> JobView:
    metadata, status = job["metadata"], job.get("status") or {}
    true = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    return JobView(
        name=metadata["name"],
        role=metadata["labels"].get(ROLE, ""),
        teacher=metadata["labels"].get(TEACHER, ""),
        created=metadata.get("creationTimestamp", ""),
        pods=job["spec"].get("completions") or 1,
        active=status.get("active") or 0,
        ready=status.get("ready") or 0,
        succeeded=status.get("succeeded") or 0,
        failed=status.get("failed") or 0,
        complete="Complete" in true,
        over="Failed" in true,
        suspended=job["spec"].get("suspend") is True,
        message=printable(true.get("Failed", {}).get("message", "")),
    )


def _deployment(deployment: Object) -> DeploymentView:
    metadata, status = deployment["metadata"], deployment.get("status") or {}
    replicas = deployment["spec"].get("replicas", 1)
    current = status.get("observedGeneration", 0) >= metadata.get("generation", 0)
    ready = (status.get("readyReplicas") or 0) if current else 0
    updated = status.get("updatedReplicas") or 0
    # Quota, or an admission rule that no pod of this template passes.
    refused = [c for c in status.get("conditions") or [] if c["type"] == "ReplicaFailure" and c["status"] == "True"]
    return DeploymentView(
        name=metadata["name"],
        role=metadata["labels"].get(ROLE, ""),
        replicas=replicas,
        ready=status.get("readyReplicas") or 0,
        available=current and updated >= replicas and ready >= replicas,
        revision=metadata["labels"].get(REVISION, ""),
        trouble=_told(Reason.REJECTED, refused[0].get("message", "")) if refused else None,
    )


def _unrouted(route: Object) -> str:
    """What its gateways object to; empty if one takes it. Their word on an older generation counts, too: every step of
    a rollout is a new one."""
    name = route["metadata"]["name"]
    troubles = []
    for parent in (route.get("status") or {}).get("parents") or []:
        said = {c["type"]: c for c in parent.get("conditions") or []}
        if said.get("Accepted", {}).get("status") == "True" and said.get("ResolvedRefs", {}).get("status") != "False":
            return ""
        for condition in ("Accepted", "ResolvedRefs"):
            if said.get(condition, {}).get("status") == "False":
                why = f"{said[condition].get('reason')}: {said[condition].get('message')}"
                troubles.append(f"Gateway {parent['parentRef']['name']} does not use HTTPRoute {name}: {why}")
    return "; ".join(troubles) or f"no controller of a Gateway has answered for HTTPRoute {name} yet"


def _followed(route: Object) -> bool:
    """Whether no gateway that takes the route is behind its newest change, as far as they say so."""
    now = route["metadata"].get("generation", 0)
    taken = [c for parent in (route.get("status") or {}).get("parents") or [] for c in parent.get("conditions") or []]
    return all(c.get("observedGeneration", now) >= now for c in taken if c.get("type") == "Accepted")


def _pod(pod: Object) -> PodView:
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels, conditions = metadata.get("labels") or {}, status.get("conditions") or []
    true = {c["type"] for c in conditions if c.get("status") == "True"}
    index = (metadata.get("annotations") or {}).get(COMPLETION_INDEX, "0")
    containers, init = status.get("containerStatuses") or [], status.get("initContainerStatuses") or []
    ours = CONTAINERS.get(labels.get(ROLE, ""))
    own = [container for container in containers if container["name"] == ours]
    others = [*init, *(container for container in containers if container["name"] != ours)]
    ended = words(own)
    return PodView(
        name=metadata["name"],
        role=labels.get(ROLE, ""),
        index=int(index) if index.isdecimal() and len(index) <= 10 else 0,
        phase=status.get("phase", ""),
        message=printable(status.get("message", "")),
        ready="Ready" in true,
        ip=status.get("podIP", ""),
        disrupted=_disrupted(status, true),
        ended=ended,
        before=words(own, "lastState"),
        failed=words(container for container in others if _exit_code(container)),
        held=next((each["name"] for each in others if ended and each.get("state", {}).get("running") is not None), ""),
        trouble=_leaving(pod, conditions) or _trouble(pod, conditions, [*init, *containers]),
        restarts=sum(container.get("restartCount", 0) for container in own),
        job=labels.get("job-name", labels.get("batch.kubernetes.io/job-name", "")),
        teacher=labels.get(TEACHER, ""),
        revision=labels.get(REVISION, ""),
    )


def _exit_code(container: Object) -> int:
    """0 as long as it has not ended."""
    code: int = (container.get("state", {}).get("terminated") or {}).get("exitCode", 0)
    return code


_OWN_LIMIT = re.compile(r"exceed(s the|ed its local)")  # kubelet, pkg/kubelet/eviction/helpers.go


def _disrupted(status: Object, true: set[str]) -> bool:
    """Evicted, preempted or lost with its node; a pod that used more than its own limit has itself to blame."""
    if status.get("reason") == "Evicted" and _OWN_LIMIT.search(status.get("message", "")):
        return False
    return "DisruptionTarget" in true or status.get("reason") in ("Evicted", "NodeLost", "Shutdown")


def _leaving(pod: Object, conditions: Iterable[Object]) -> tuple[Reason, str] | None:
    """A pod sent away while it runs. That of a lost node stays so, since only a person knows whether it is off."""
    why = next((c for c in conditions if c["type"] == "DisruptionTarget" and c.get("status") == "True"), None)
    if why is None or "deletionTimestamp" not in pod["metadata"] or (pod.get("status") or {}).get("phase") != "Running":
        return None
    name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
    said = why.get("message") or why.get("reason", "")
    return _told(
        Reason.DISRUPTED,
        f"pod {name} is leaving node {node} ({said}); if that machine is off: "
        f"kubectl taint node {node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
    )


_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ErrImageInspect"}


def _trouble(pod: Object, conditions: Iterable[Object], containers: Iterable[Object]) -> tuple[Reason, str] | None:
    name, spec = pod["metadata"]["name"], pod.get("spec") or {}
    for condition in conditions:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return _told(Reason.UNSCHEDULABLE, condition.get("message", ""))
        if condition["type"] == "PodScheduled" and condition.get("reason") == "SchedulingGated":
            gates = ", ".join(gate.get("name", "") for gate in spec.get("schedulingGates") or [])
            return _told(Reason.QUEUED, f"pod {name} waits for its admission (scheduling gate {gates})")
    preparing = None
    for container in containers:
        waiting = container.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in ("ContainerCreating", "PodInitializing"):
            # Only an event says which of them: a claim that another node holds, a Secret, the network.
            text = f"pod {name} waits on node {spec.get('nodeName', '')} for volumes, network or image"
            preparing = _told(Reason.STARTING, f"{text}; `kubectl describe pod {name}` says for which")
        if reason in _PULL:
            return _told(Reason.IMAGE_PULL_FAILED, f"{container.get('image', '')}: {message or reason}")
        if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            return _told(Reason.CRASHING, f"{container['name']}: {reason}: {message}")
        if reason == "CrashLoopBackOff":
            last = container.get("lastState", {}).get("terminated") or {}
            return _told(
                Reason.CRASHING,
                f"{container['name']} ended with exit code {last.get('exitCode', '?')}: "
                f"{(last.get('message') or message).strip()[-500:]}",
            )
    return preparing


def parse_time(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
