"""The child objects of a distillation as plain data; the order is the order in which they are applied. Pure."""

from collections.abc import Mapping
from typing import Any

from opd_core.api.digests import digest
from opd_core.api.types import OPDDistillation

from opd_operator import names
from opd_operator.context import Context, Manifest
from opd_operator.draft import Wanted
from opd_operator.endpoint import endpoint
from opd_operator.policies import network_policy
from opd_operator.settings import Settings
from opd_operator.workloads import evaluator, teacher_trainer, teachers, trainer


def build(
    obj: Mapping[str, Any],
    distillation: OPDDistillation,
    run: Mapping[str, Any],
    wanted: Wanted,
    settings: Settings,
) -> list[Manifest]:
    """Every child that shall exist. `run`: status.run."""
    context = Context(obj, distillation, run, settings)
    manifests = [each for index, number in wanted.teach.items() for each in teacher_trainer(context, index, number)]
    if wanted.teachers:
        manifests += teachers(context)
    if wanted.trainer is not None:
        manifests += trainer(context, wanted.trainer)
    if wanted.evaluator is not None:
        manifests += evaluator(context, *wanted.evaluator)
    if wanted.served:
        manifests += endpoint(context, wanted.served)
    if not manifests:
        return []
    used = sorted({manifest["metadata"]["labels"][names.ROLE] for manifest in manifests})
    policies = [_policy(context, role) for role in used] if settings.network_policies else []
    shared = [context.service_account(), *context.config_maps.values()]
    return [_finished(context, manifest) for manifest in (*shared, *policies, *manifests)]


def _policy(context: Context, role: str) -> Manifest:
    more = context.settings.extra_egress
    outside = context.reward_ports(role) | ({443} if context.remote(role) else set())
    spec = network_policy(context.name, role, outside=outside, more=more)
    return context.child("networking.k8s.io/v1", "NetworkPolicy", f"{context.name}-{role}", role, spec=spec)


def _finished(context: Context, manifest: Manifest) -> Manifest:
    manifest["metadata"]["ownerReferences"] = [names.owner(context.obj)]
    manifest["metadata"]["annotations"] = {
        names.MANIFEST: digest(manifest)[:16],
        names.INSTALLATION: context.settings.installation,
    }
    return manifest
