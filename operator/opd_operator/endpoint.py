"""The endpoint as child objects: a Service, a Deployment per revision, what scales, guards and routes them. Pure."""

from opd_core import roles
from opd_core.api.digests import claims_of
from opd_core.api.types import Endpoint

from opd_operator import names
from opd_operator.context import Context, Manifest, service_ports
from opd_operator.draft import Served
from opd_operator.pods import KEYS, pod_template
from opd_operator.policies import autoscaler, disruption_budget, http_route

_GRACE = 300  # every accepted image is finished
_LEAVE_SERVICE = 10  # seconds until every node has taken the pod out of its Service


def endpoint(context: Context, served: list[Served]) -> list[Manifest]:
    name, settings = f"{context.name}-endpoint", context.spec.endpoint
    selector = names.selector(context.name, names.ENDPOINT)
    # Its clients may be of either family; what a gateway asks is asked as pods are asked.
    manifests = [_service(context, name, selector, ipFamilyPolicy="PreferDualStack")]
    manifests += [_revision(context, each) for each in served]
    # After the Deployments: what a cluster may refuse, and does not have to have, holds no student back.
    if settings.replicas > 1:
        budget = disruption_budget(selector)
        manifests.append(context.child("policy/v1", "PodDisruptionBudget", name, names.ENDPOINT, spec=budget))
    if settings.autoscaling:
        scaler = autoscaler(context.name, settings.autoscaling)
        manifests.append(context.child("autoscaling/v2", "HorizontalPodAutoscaler", name, names.ENDPOINT, spec=scaler))
    if settings.route:
        backends = {names.endpoint(context.name, each.revision): each.weight for each in served}
        manifests += [
            _service(context, names.endpoint(context.name, each.revision), {**selector, names.REVISION: each.revision})
            for each in served
        ]
        route = http_route(settings.route, backends)
        manifests.append(context.child("gateway.networking.k8s.io/v1", "HTTPRoute", name, names.ENDPOINT, spec=route))
    return manifests


def _service(context: Context, name: str, selector: dict[str, str], **more: str) -> Manifest:
    spec = {"selector": selector, "ports": service_ports({"http": names.ENDPOINT_HTTP}), **more}
    return context.child("v1", "Service", name, names.ENDPOINT, spec=spec)


def _revision(context: Context, served: Served) -> Manifest:
    settings = Endpoint.model_validate_json(served.settings)
    spec = context.spec.model_copy(update={"endpoint": settings})
    place = context.place(context.runs / served.key)
    recipe = roles.endpoint(
        place,
        context.distillation.model_copy(update={"spec": spec}),
        names.ENDPOINT_HTTP,
        names.ENDPOINT_METRICS,
        leave_seconds=_LEAVE_SERVICE,
        api_keys=KEYS / settings.api_keys.key if settings.api_keys else None,
    )
    revision = {names.REVISION: served.revision}
    template = pod_template(
        recipe,
        settings.pod,
        image=served.image,
        labels={**context.pod_labels(names.ENDPOINT), **revision},
        service_account=context.account,
        config_map=None,
        claims=dict.fromkeys([*claims_of(context.content["model"]), context.output_claim], False),
        grace_seconds=_GRACE,
        secrets={settings.api_keys.secret_name: KEYS} if settings.api_keys else {},
        fixed_user=context.settings.fixed_user,
    )
    surge = context.spec.endpoint.rollout.max_surge
    deployment = {
        "replicas": served.replicas,
        "paused": False,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": 1 - surge}},
        "revisionHistoryLimit": 0,
        "selector": {"matchLabels": {**names.selector(context.name, names.ENDPOINT), **revision}},
        "template": template,
    }
    manifest = context.child(
        "apps/v1", "Deployment", names.endpoint(context.name, served.revision), names.ENDPOINT, spec=deployment
    )
    manifest["metadata"]["labels"].update(revision)
    return manifest
