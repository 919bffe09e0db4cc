"""Who may talk to whom, how many endpoint pods may leave at once and how many there shall be. Pure."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from opd_core.api.types import API_VERSION, KIND, Autoscaling, Route

from opd_operator import names

_DNS = (53, 5353)  # policies see the pod behind the Service, and OpenShift's DNS pods listen on 5353


def network_policy(
    name: str, role: str, *, outside: Set[int], more: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Everything that is not here is closed.

    Args:
        outside: TCP ports that the role asks at any address. more: egress rules of the installation.
    """
    dns = {"ports": [{"protocol": protocol, "port": port} for port in _DNS for protocol in ("UDP", "TCP")]}
    anywhere = [{"ports": _ports(*sorted(outside))}] if outside else []
    ingress: dict[str, list[dict[str, Any]]] = {
        # Ranks of NCCL and gloo talk on ports that the kernel chooses.
        names.TEACH: [_from(name, names.TEACH), {"ports": _ports(names.TRAINER_METRICS)}],
        names.TRAINER: [_from(name, names.TRAINER), {"ports": _ports(names.TRAINER_METRICS)}],
        names.TEACHERS: [
            _from(name, names.TRAINER, names.GRPC),
            {"ports": _ports(names.TRITON_METRICS)},
        ],
        names.EVALUATOR: [],
        names.ENDPOINT: [{"ports": _ports(names.ENDPOINT_HTTP, names.ENDPOINT_METRICS)}],
    }
    egress: list[dict[str, Any]] = [dns, *anywhere, *(dict(rule) for rule in more)]
    if role in (names.TEACH, names.TRAINER):
        egress.append(_to(name, role))
    if role == names.TRAINER:
        egress.append(_to(name, names.TEACHERS, names.GRPC))
    return {
        "podSelector": {"matchLabels": names.selector(name, role)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress[role],
        "egress": egress,
    }


def disruption_budget(selector: Mapping[str, str]) -> dict[str, Any]:
    return {"maxUnavailable": 1, "selector": {"matchLabels": dict(selector)}}


def autoscaler(name: str, scaling: Autoscaling) -> dict[str, Any]:
    """Scales the distillation, not its Deployments: `spec.endpoint.replicas` has one owner, and a rollout keeps it."""
    return {
        "scaleTargetRef": {"apiVersion": API_VERSION, "kind": KIND, "name": name},
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas,
        "metrics": [
            {
                "type": "Pods",
                "pods": {
                    "metric": {"name": "opd_endpoint_queue_depth"},
                    "target": {"type": "AverageValue", "averageValue": str(scaling.target_queued_images)},
                },
            }
        ],
    }


def http_route(route: Route, backends: Mapping[str, int]) -> dict[str, Any]:
    """The API alone is published. `backends`: weight by Service; the weights sum to 100."""
    parent = {"name": route.gateway, "namespace": route.gateway_namespace, "sectionName": route.section_name}
    return {
        "parentRefs": [{key: value for key, value in parent.items() if value}],
        "hostnames": list(route.hostnames),
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                "timeouts": {"request": "0s"},  # an image may take minutes; the endpoint has a limit of its own
                "backendRefs": [
                    {"name": name, "port": names.ENDPOINT_HTTP, "weight": weight} for name, weight in backends.items()
                ],
            }
        ],
    }


def _from(name: str, role: str, *ports: int) -> dict[str, Any]:
    return {"from": [_peer(name, role)], **({"ports": _ports(*ports)} if ports else {})}


def _to(name: str, role: str, *ports: int) -> dict[str, Any]:
    return {"to": [_peer(name, role)], **({"ports": _ports(*ports)} if ports else {})}


def _peer(name: str, role: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": names.selector(name, role)}}


def _ports(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
