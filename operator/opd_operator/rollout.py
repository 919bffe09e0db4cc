"""How students replace one another behind the endpoint: canary steps, promotion, rollback. Pure.

With a route, traffic goes to revisions by its weights; without one, by their share of the ready pods of one Service.
Gateways follow a route, and the pods behind it, seconds later and in no order: a pod gets its part of the weight when
it has been ready for a while (`followSeconds` after the controller took the last change), and what it relieves stays
for a while after that.
The old revision shrinks only as fast as the new one takes over, and gives no weight away before (kserve#5983); one pod
of it stays until the new one has all the traffic. A promotion restarts nothing.
"""

import json
import math
from enum import Enum
from typing import Any

from opd_core.api.digests import digest, said
from opd_core.api.types import RolloutStrategy
from opd_core.stages import Condition, Reason, Stage

from opd_operator import names
from opd_operator.draft import Draft, Served, timestamp
from opd_operator.observe import DeploymentView, Requests
from opd_operator.shares import Look

_REVISION_LENGTH = 8
_CRASHES = 3  # of a canary's container, before its deadline
_FEWEST = 10  # requests that a rate is taken of
_SURELY = 0.01  # chance at which so many failures are no accident of a good student
_OF_A_REVISION = ("revision", "digest", "key", "image", "settings", "started")
_NOT_IN_TEMPLATE = ("enabled", "suspend", "replicas", "rollout", "autoscaling", "route", "studentDigest")


def serve(d: Draft) -> None:
    """Deployed and Serving, and the revisions that shall exist."""
    if not d.spec.endpoint.enabled:
        d.status.pop("endpoint", None)
        d.mark(Condition.SERVING, False, Reason.DISABLED)
        d.mark(Stage.DEPLOYED, False, Reason.DISABLED, "spec.endpoint.enabled is false")
        return
    if d.spec.endpoint.suspend:
        _suspend(d)
        return
    endpoint = d.status.setdefault("endpoint", {})
    target = _target(d, endpoint)
    if target and endpoint.get("rejected", {}).get("revision") != target["revision"]:
        endpoint.pop("rejected", None)
    _choose(d, endpoint, target)
    if "canary" in endpoint:
        _canary(d, endpoint)
    if "stable" in endpoint and "canary" not in endpoint:
        _stable(d, endpoint, told=target is None)
    _leave(d, endpoint)
    _report(d, endpoint, target)


def _suspend(d: Draft) -> None:
    """Free the endpoint's pods. What was in service comes back as the same revision; a rollout begins anew, and what
    had failed is tried again."""
    endpoint = d.status.get("endpoint", {})
    for part in ("canary", "rejected", "leaving"):
        endpoint.pop(part, None)
    if "deployed" not in endpoint.get("stable", {}):
        endpoint.pop("stable", None)
    if not d.completed(Stage.DEPLOYED):
        d.times.pop(Stage.DEPLOYED, None)
    left = d.observed.active(names.ENDPOINT)
    if endpoint.get("stable"):
        endpoint.update(replicas=0, readyReplicas=0)
    else:
        d.status.pop("endpoint", None)
    what = (Reason.STOPPING, f"{len(left)} pods are still ending") if left else (Reason.SUSPENDED, "endpoint.suspend")
    d.mark(Stage.DEPLOYED, False, *what)
    d.mark(Condition.SERVING, False, *what)


def _target(d: Draft, endpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The revision that the spec asks for: the student named in it, else this run's if it passed its gate, else the one
    that serves; where none serves, the newest that has passed."""
    current, stable, known = d.status.get("student"), endpoint.get("stable"), d.status.get("students", [])
    if pinned := d.spec.endpoint.student_digest:
        found = [student for student in [*known, *([current] if current else [])] if student["digest"] == pinned]
        if not found:
            text = f"spec.endpoint.studentDigest {pinned[:19]} is no student of this object"
            d.mark(Stage.DEPLOYED, False, Reason.UNKNOWN_STUDENT, text)
    elif current and current.get("gatePassed") and d.holds(Condition.EVALUATED):
        found = [current]
    elif stable:
        found = [stable]
    else:
        found = [student for student in known if student.get("gatePassed") and student != current]
    if not found:
        return None
    student = found[-1]
    image = next((each.get("image") for each in known if each["digest"] == student["digest"]), None)
    settings = _settings(d)
    return {
        "revision": digest(student["digest"], student["key"], settings)[:_REVISION_LENGTH],
        "digest": student["digest"],
        "key": student["key"],
        "image": d.spec.endpoint.pod.image or image or d.images[names.ENDPOINT],
        "settings": json.dumps(settings, sort_keys=True),
    }


def _choose(d: Draft, endpoint: dict[str, Any], target: dict[str, Any] | None) -> None:
    """Begin, go on with or give up a rollout."""
    stable, canary = endpoint.get("stable"), endpoint.get("canary")
    if target is None or "rejected" in endpoint or (stable and stable["revision"] == target["revision"]):
        endpoint.pop("canary", None)
    elif stable is None or "deployed" not in stable:
        endpoint["stable"] = {**target, "started": timestamp(d.now)}  # nobody's traffic depends on it yet
        endpoint.pop("canary", None)
    elif canary is None or canary["revision"] != target["revision"]:
        now = timestamp(d.now)
        endpoint["canary"] = {**target, "step": 0, "trafficPercent": 0, "started": now, "stepStarted": now}


def _stable(d: Draft, endpoint: dict[str, Any], *, told: bool) -> None:
    """`told`: why nothing is deployed is said already."""
    stable, view = endpoint["stable"], _view(d, endpoint["stable"])
    d.wanted.served.append(_served(d, stable, d.spec.endpoint.replicas, 100))
    if view and view.available and "deployed" not in stable:
        _in_service(d, stable)
    if "deployed" in stable or "rejected" in endpoint:
        return
    d.begin(Stage.DEPLOYED)
    reason, message = d.observed.trouble(names.ENDPOINT) or (Reason.STARTING, "the endpoint starts")
    if not told:
        d.mark(Stage.DEPLOYED, False, reason, message)
    limit = d.spec.run_policy.stage_deadlines.deployed
    if d.late(stable["started"], limit):
        text = f"did not answer within spec.runPolicy.stageDeadlines.deployed = {limit} s; {message}"
        _reject(endpoint, stable, Reason.DEADLINE_EXCEEDED, text)
        d.wanted.served.clear()
        del endpoint["stable"]


class _Phase(Enum):
    """Of a canary at one look."""

    GROWING = "its pods or its weight are not what the step asks for"
    HOLDING = "they are, for less than the interval"
    BLIND = "they are for long enough, and nothing tells how its requests end"
    PASSED = "the next step begins"
    PROMOTED = "it has all the traffic"


def _canary(d: Draft, endpoint: dict[str, Any]) -> None:
    """One look at a rollout: shares, progress, rollback, promotion."""
    stable, canary = endpoint["stable"], endpoint["canary"]
    if problem := _problem(d, canary):
        _reject(endpoint, canary, *problem)
        return
    look = _look(d, stable, canary)
    relieved = _steer(d, canary, look)
    phase = _phase(d, canary, look)
    if phase == _Phase.PROMOTED:
        endpoint["stable"] = {name: canary[name] for name in _OF_A_REVISION if name in canary}
        _in_service(d, endpoint["stable"])
        del endpoint["canary"]
        return
    if phase == _Phase.PASSED:
        canary.update(step=canary["step"] + 1, stepStarted=timestamp(d.now))
        del canary["since"]
        _canary(d, endpoint)
        return
    weight = canary["trafficPercent"]
    d.wanted.served.append(_served(d, stable, look.kept(relieved), 100 - weight))
    d.wanted.served.append(_served(d, canary, look.grown, weight))
    d.begin(Stage.DEPLOYED)
    message = f"{canary['digest'][:19]} gets {weight} % of the traffic, aims at {look.percent} %"
    if phase == _Phase.BLIND:
        text = "/metrics of none of its pods can be read, so it goes no further; `opd promote` takes it without"
        d.mark(Stage.DEPLOYED, False, Reason.NO_FIGURES, f"{message}; {text}")
    else:
        d.mark(Stage.DEPLOYED, False, Reason.CANARY, message)


def _look(d: Draft, stable: dict[str, Any], canary: dict[str, Any]) -> Look:
    rollout, old = d.spec.endpoint.rollout, _view(d, stable)
    steps = rollout.steps if rollout.strategy == RolloutStrategy.CANARY else []
    return Look(
        replicas=d.spec.endpoint.replicas,
        surge=rollout.max_surge,
        percent=steps[canary["step"]] if canary["step"] < len(steps) else 100,
        new=_view(d, canary),
        old_ready=old.ready if old else 0,
        holding=sum(pod.revision == stable["revision"] and pod.active for pod in d.observed.pods),
    )


def _phase(d: Draft, canary: dict[str, Any], look: Look) -> _Phase:
    """`since`: when its pods and its weight became what the step asks for."""
    if not look.enough or (d.spec.endpoint.route and canary["trafficPercent"] != look.percent):
        if canary.pop("since", None):
            canary["stepStarted"] = timestamp(d.now)
        return _Phase.GROWING
    canary.setdefault("since", timestamp(d.now))
    if look.percent == 100:
        return _Phase.PROMOTED
    if not d.late(canary["since"], d.spec.endpoint.rollout.interval_seconds):
        return _Phase.HOLDING
    known = d.observed.requests is not None or d.spec.endpoint.student_digest == canary["digest"]
    return _Phase.PASSED if known else _Phase.BLIND


def _steer(d: Draft, canary: dict[str, Any], look: Look) -> int:
    """Set the canary's share of the traffic. How many pods of the old revision carry nothing any more."""
    if not d.spec.endpoint.route:
        canary["trafficPercent"] = look.of_ready
        return look.ready
    return look.relieved(_move(d, canary, look))


def _move(d: Draft, canary: dict[str, Any], look: Look) -> int:
    """Set the canary's weight in the route: what its pods can carry. More than before only when every gateway has seen
    the pods and follows the last weight, less at once. The weight that every gateway follows."""
    weight, followed = canary["trafficPercent"], canary.get("followedPercent", 0)
    if look.ready != canary.get("readyReplicas"):
        canary.update(readyReplicas=look.ready, changed=timestamp(d.now))
    if not d.observed.followed:
        canary["changed"] = timestamp(d.now)  # its controller has not taken the last change yet
    elif d.late(canary["changed"], _follow_seconds(d)):
        followed = weight
        if look.carried > weight:
            weight, canary["changed"] = look.carried, timestamp(d.now)
            d.late(canary["changed"], _follow_seconds(d))
    weight = min(weight, look.carried)
    followed = min(followed, weight)
    canary.update(trafficPercent=weight, followedPercent=followed)
    return int(followed)


def _leave(d: Draft, endpoint: dict[str, Any]) -> None:
    """What has just lost its place in the route."""
    before = endpoint.pop("leaving", {})
    if d.spec.endpoint.route is None or not d.wanted.served:
        return
    serving = {each.revision for each in d.wanted.served}
    views = [view for view in d.observed.deployments.values() if view.role == names.ENDPOINT]
    leaving = {
        view.revision: before.get(view.revision, timestamp(d.now)) for view in views if view.revision not in serving
    }
    for revision, since in leaving.items():
        if not d.late(since, _follow_seconds(d)):
            name = names.endpoint(d.name, revision)
            d.wanted.keep |= {("Deployment", name), ("Service", name)}
    if leaving:
        endpoint["leaving"] = leaving


def _follow_seconds(d: Draft) -> int:
    """Until every proxy does what its gateway's controller has taken."""
    route = d.spec.endpoint.route
    return route.follow_seconds if route else 0


def _in_service(d: Draft, stable: dict[str, Any]) -> None:
    """It has all the traffic: from now on there is something to roll back to."""
    stable["deployed"] = True
    for student in d.status.get("students", []):
        if student["digest"] == stable["digest"]:
            student["served"] = True
    d.complete(Stage.DEPLOYED)


def _problem(d: Draft, canary: dict[str, Any]) -> tuple[Reason, str] | None:
    """Why this canary must go, if it must."""
    limit, rollout = d.spec.run_policy.stage_deadlines.deployed, d.spec.endpoint.rollout
    requests = d.observed.requests
    if requests and too_many_failed(requests, rollout.max_error_rate):
        text = f"{requests.failed} of its {requests.total} requests failed"
        return Reason.ROLLED_BACK, f"{text}, spec.endpoint.rollout.maxErrorRate is {rollout.max_error_rate:.1%}"
    for pod in d.observed.pods:
        if pod.revision == canary["revision"] and pod.trouble and pod.restarts >= _CRASHES:
            return Reason.ROLLED_BACK, f"{pod.name}: {pod.trouble[1]}"
    if "since" not in canary and d.late(canary["stepStarted"], limit):
        why = d.observed.trouble(names.ENDPOINT)
        text = f"was not ready within spec.runPolicy.stageDeadlines.deployed = {limit} s"
        return Reason.ROLLED_BACK, f"{text}; {why[1]}" if why else text
    return None


def too_many_failed(requests: Requests, allowed: float) -> bool:
    """Whether so many failures are too unlikely for a student that fails at the allowed rate (binomial tail); a handful
    of requests says nothing."""
    failed, total = requests.failed, requests.total
    if total < _FEWEST or failed <= allowed * total:
        return False
    if allowed == 0:
        return True
    below = sum(
        math.exp(
            math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
            + k * math.log(allowed) + (total - k) * math.log1p(-allowed)
        )
        for k in range(failed)
    )  # fmt: skip
    return 1 - below < _SURELY


def _reject(endpoint: dict[str, Any], served: dict[str, Any], reason: Reason, message: str) -> None:
    endpoint["rejected"] = {"revision": served["revision"], "reason": reason.value, "message": message[:1024]}
    endpoint.pop("canary", None)


def _report(d: Draft, endpoint: dict[str, Any], target: dict[str, Any] | None) -> None:
    stable, rejected = endpoint.get("stable"), endpoint.get("rejected")
    views = [view for view in d.observed.deployments.values() if view.role == names.ENDPOINT]
    ready = sum(view.ready for view in views)
    trouble = _trouble(d, ready)
    if rejected:
        d.mark(Stage.DEPLOYED, False, Reason(rejected["reason"]), rejected["message"])
        if d.holds(Condition.EVALUATED) and Condition.FAILED not in d.marks:
            d.mark(Condition.FAILED, True, Reason(rejected["reason"]), rejected["message"])
    elif stable and target and "canary" not in endpoint and "deployed" in stable:
        if trouble is None or d.spec.endpoint.replicas == 0:
            d.mark(Stage.DEPLOYED, True, Reason.COMPLETED, stable["digest"][:19])
        else:
            d.mark(Stage.DEPLOYED, False, *trouble)
    if not stable and not d.wanted.served:
        d.mark(Condition.SERVING, False, Reason.WAITING, "no student has passed its gate yet")
        if not rejected:
            d.status.pop("endpoint", None)
        return
    d.mark(Condition.SERVING, trouble is None, *(trouble or (Reason.AVAILABLE,)))
    endpoint.update(
        url=_url(d),
        replicas=sum(view.replicas for view in views),
        readyReplicas=ready,
        selector=",".join(f"{key}={value}" for key, value in sorted(names.selector(d.name, names.ENDPOINT).items())),
    )


def _url(d: Draft) -> str:
    """Where clients reach it; a route of wildcards alone has no name that could be told."""
    route = d.spec.endpoint.route
    named = [host for host in route.hostnames if not host.startswith("*")] if route else []
    if route and named:
        return f"{'https' if route.tls else 'http'}://{named[0]}"
    return f"http://{names.host(d.name, d.namespace)}"


def _trouble(d: Draft, ready: int) -> tuple[Reason, str] | None:
    """Why nobody answers at the endpoint's address, if nobody does."""
    if ready == 0:
        return d.observed.trouble(names.ENDPOINT) or (Reason.UNAVAILABLE, "no endpoint pod is ready")
    if d.spec.endpoint.route and d.observed.unrouted:
        return Reason.NOT_ROUTED, d.observed.unrouted
    return None


def _view(d: Draft, served: dict[str, Any]) -> DeploymentView | None:
    return d.observed.deployments.get(names.endpoint(d.name, served["revision"]))


def _served(d: Draft, entry: dict[str, Any], replicas: int, weight: int) -> Served:
    """It keeps its own settings while the spec's are tried on another. A status from before they were kept has none."""
    settings = entry.get("settings") or json.dumps(_settings(d))
    return Served(entry["revision"], entry["digest"], entry["key"], entry["image"], settings, replicas, weight)


def _settings(d: Draft) -> dict[str, Any]:
    """What the pods of a revision that begins now are made of."""
    return {key: value for key, value in said(d.spec.endpoint).items() if key not in _NOT_IN_TEMPLATE}
