"""What trains teachers, serves them, trains the student and evaluates it, as child objects. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from opd_core import roles
from opd_core.api.digests import claims_of, said
from opd_core.api.pod import Pod
from opd_core.api.teachers import trained_teachers
from opd_core.api.types import Spec

from opd_operator import names
from opd_operator.context import Context, Manifest, service_ports, teachers_revision
from opd_operator.pods import pod_template

_TRAINER_GRACE = 600  # a round of a large model, and its checkpoint
_SERVER_GRACE = 30
_NOWHERE = PurePosixPath("/tmp/opd")  # noqa: S108  a folder of the pod's own, for roles that work in no run's folder
# Triton's metrics are at the family of this address alone.
_POD_IP: dict[str, Any] = {"name": roles.POD_IP, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def teachers(context: Context) -> list[Manifest]:
    """A Deployment and a Service per server."""
    manifests = []
    spec, here = context.spec, context.place(_NOWHERE)
    ports = {"grpc": names.GRPC, "http": names.HTTP, "metrics": names.TRITON_METRICS}
    config_map = context.config_map(names.TEACHERS)
    claims = claims_of([context.content["model"], context.content["teachers"]])
    if trained_teachers(spec):
        claims.add(context.output_claim)
    for index, group in enumerate(roles.teacher_servers(spec)):
        name = names.teachers(context.name, index)
        own = {"opd.dev/server": str(index)}
        selector = {**names.selector(context.name, names.TEACHERS), **own}
        template = pod_template(
            roles.teacher_server(here, "teacher", group, ports),
            spec.teacher_serving.pod,
            image=context.run["images"][names.TEACHERS],
            labels={**context.pod_labels(names.TEACHERS), **own},
            service_account=context.account,
            config_map=config_map,
            claims=dict.fromkeys(claims, False),
            grace_seconds=_SERVER_GRACE,
            fixed_user=context.settings.fixed_user,
            env=[_POD_IP],
        )
        deployment = {
            "replicas": 1,
            "paused": False,
            "strategy": {"type": "Recreate"},  # a second copy would need a second GPU
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": selector},
            "template": template,
        }
        service = {"selector": selector, "ports": service_ports({"grpc": names.GRPC})}
        manifests.append(context.child("v1", "Service", name, names.TEACHERS, spec=service))
        manifest = context.child("apps/v1", "Deployment", name, names.TEACHERS, spec=deployment)
        revision = teachers_revision(context.distillation, context.run["images"][names.TEACHERS])
        manifest["metadata"]["labels"].update({names.REVISION: revision, **context.queue_labels})
        manifests.append(manifest)
    return manifests


def teacher_trainer(context: Context, index: int, number: int) -> list[Manifest]:
    """Trains the teacher with this index in the spec."""
    teacher = context.spec.teachers[index]
    recipe = roles.teacher_trainer(context.place(_NOWHERE), teacher.name, names.TRAINER_METRICS)
    return _training(
        context,
        names.TEACH,
        names.teach(context.name, index, context.run["attempt"], number),
        f"{context.name}-teach-{index}",
        replace(recipe, name=names.CONTAINERS[names.TEACH]),  # a teacher's name may be as long as a container's
        {**dict.fromkeys(claims_of([context.content["model"], said(teacher)]), False), context.output_claim: True},
        {names.TEACHER: teacher.name},
    )


def trainer(context: Context, number: int) -> list[Manifest]:
    servers = range(len(roles.teacher_servers(context.spec)))
    addresses = [f"{names.teachers(context.name, i)}.{context.namespace}.svc:{names.GRPC}" for i in servers]
    return _training(
        context,
        names.TRAINER,
        names.trainer(context.name, context.run["attempt"], number),
        f"{context.name}-trainer",
        roles.trainer(context.place(context.run_folder), addresses, names.TRAINER_METRICS),
        _claims(context),
    )


def _training(
    context: Context,
    role: str,
    job: str,
    service: str,
    recipe: roles.Recipe,
    claims: Mapping[str, bool],
    own: Mapping[str, str] = MappingProxyType({}),
) -> list[Manifest]:
    """An Indexed Job with a pod per node, and the headless Service by which the nodes find the first one.

    Args:
        own: labels of this Job's pods beyond those of its role.
    """
    training = context.spec.training
    # torchrun's own names; the address is that of the first pod through the headless Service.
    wiring: list[dict[str, Any]] = [
        {"name": "PET_NNODES", "value": str(training.nodes)},
        {"name": "PET_MASTER_ADDR", "value": f"{job}-0.{service}.{context.namespace}.svc"},
        {"name": "PET_MASTER_PORT", "value": str(names.RENDEZVOUS)},
        {
            "name": "PET_NODE_RANK",
            "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{names.COMPLETION_INDEX}']"}},
        },
    ]
    template = pod_template(
        recipe,
        training.pod,
        image=context.run["images"][names.TRAINER],
        labels={**context.pod_labels(role), **own},
        service_account=context.account,
        config_map=context.config_map(role),
        claims=claims,
        grace_seconds=_TRAINER_GRACE,
        fixed_user=context.settings.fixed_user,
        restart="Never",
        env=wiring if training.nodes > 1 else (),
        more={"subdomain": service},
    )
    headless = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # the ranks look for each other before they are ready
        "selector": {**names.selector(context.name, role), **own},
        "ports": service_ports({"rendezvous": names.RENDEZVOUS, "metrics": names.TRAINER_METRICS}),
    }
    manifest = _job(context, job, role, template, pods=training.nodes)
    manifest["metadata"]["labels"].update(own)
    return [context.child("v1", "Service", service, role, spec=headless), manifest]


def evaluator(context: Context, key: str, number: int) -> list[Manifest]:
    """A Job with one pod, in the trainer's image."""
    template = pod_template(
        roles.evaluator(context.place(context.run_folder)),
        evaluation_pod(context.spec),
        image=context.run["images"][names.TRAINER],
        labels=context.pod_labels(names.EVALUATOR),
        service_account=context.account,
        config_map=context.config_map(names.EVALUATOR),
        claims=_claims(context),
        grace_seconds=_SERVER_GRACE,
        fixed_user=context.settings.fixed_user,
        restart="Never",
    )
    return [_job(context, names.evaluator(context.name, key, number), names.EVALUATOR, template, pods=1)]


def evaluation_pod(spec: Spec) -> Pod:
    """Settings of the evaluator's pod: where nothing is said, training's; each of its devices has a rank."""
    return spec.evaluation.pod or spec.training.pod


def _job(context: Context, name: str, role: str, template: Manifest, *, pods: int) -> Manifest:
    # One failed rank ends all of them, and the operator starts a new Job at the last checkpoint: ranks that are
    # restarted one by one wait for peers that have gone (kubeflow/trainer#2269). Why it failed is read from the pods
    # rather than left to a podFailurePolicy, which sees exit codes but not what the program said.
    spec = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": template,
    }
    manifest = context.child("batch/v1", "Job", name, role, spec=spec)
    manifest["metadata"]["labels"].update(context.queue_labels)
    return manifest


def _claims(context: Context) -> dict[str, bool]:
    inputs = [context.content["model"], context.content["teachers"], context.spec.student.init_from]
    return {**dict.fromkeys(claims_of(inputs), False), context.output_claim: True}
