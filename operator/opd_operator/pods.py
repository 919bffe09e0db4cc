"""A recipe as a Pod under the restricted Pod Security Standard: the same program that `opd run` starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from opd_core.api.digests import said
from opd_core.api.pod import Pod, Volume
from opd_core.ports import EVERYWHERE
from opd_core.roles import Place, Probe, Recipe

SPEC_FOLDER = PurePosixPath("/etc/opd")
CLAIMS = PurePosixPath("/mnt/claims")
SPEC_FILE = "distill.json"
KEYS = PurePosixPath("/etc/opd-keys")
TERMINATION_LOG = "/dev/termination-log"

_USER = 65532  # "nonroot" of the distroless images
_STARTUP_FAILURES = 720  # a first start may fetch a model; spec.runPolicy.stageDeadlines ends it


def place(python: str, device: str, work: PurePosixPath) -> Place:
    """Where every role finds things in its pod."""
    return Place(python, SPEC_FOLDER / SPEC_FILE, CLAIMS, work, host=EVERYWHERE, device=device)


def pod_template(
    recipe: Recipe,
    pod: Pod,
    *,
    image: str,
    labels: Mapping[str, str],
    service_account: str,
    config_map: str | None,
    claims: Mapping[str, bool],
    grace_seconds: int,
    fixed_user: bool,
    restart: str = "Always",
    env: Sequence[Mapping[str, Any]] = (),
    more: Mapping[str, Any] | None = None,
    secrets: Mapping[str, PurePosixPath] | None = None,
) -> dict[str, Any]:
    """A PodTemplateSpec with one container.

    Args:
        config_map: holds the spec. claims: name -> whether it is mounted for writing.
        fixed_user: whether it runs as the user of the images, or as the one that the cluster gives it.
        env: for this role only. more: further fields of the pod's spec. secrets: name -> folder it is mounted in.
    """
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    if config_map:
        volumes.append({"name": "spec", "configMap": {"name": config_map}})
        mounts.append({"name": "spec", "mountPath": str(SPEC_FOLDER), "readOnly": True})
    for index, (claim, writable) in enumerate(sorted(claims.items())):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mount = {"name": f"claim-{index}", "mountPath": str(CLAIMS / claim)}
        mounts.append(mount if writable else {**mount, "readOnly": True})
    for index, (secret, folder) in enumerate(sorted((secrets or {}).items())):
        volumes.append({"name": f"secret-{index}", "secret": {"secretName": secret}})
        mounts.append({"name": f"secret-{index}", "mountPath": str(folder), "readOnly": True})
    for index, extra in enumerate(pod.volumes):
        volumes.append({"name": f"extra-{index}", **_source(extra)})
        mounts.append({"name": f"extra-{index}", "mountPath": extra.mount_path, "readOnly": extra.read_only})
    container: dict[str, Any] = {
        "name": recipe.name,
        "image": pod.image or image,
        "imagePullPolicy": pod.image_pull_policy,
        "command": [recipe.argv[0], "-m", "opd_core.init", *recipe.argv],
        "env": _env(recipe, pod, env),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    resources = {name: dict(value) for name, value in pod.resources if value}
    if resources:
        container["resources"] = resources
    if recipe.ports:
        container["ports"] = [{"name": name, "containerPort": port} for name, port in sorted(recipe.ports.items())]
    container.update(_probes(recipe))
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": service_account,
        "securityContext": {
            "runAsNonRoot": True,
            **({"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER} if fixed_user else {}),
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": grace_seconds,
        "restartPolicy": restart,
        "containers": [container],
        "volumes": volumes,
        **(more or {}),
    }
    if pod.node_selector:
        spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        plain = [toleration.model_dump(by_alias=True, exclude_none=True) for toleration in pod.tolerations]
        spec["tolerations"] = [{key: value for key, value in each.items() if value != ""} for each in plain]
    if pod.affinity:
        spec["affinity"] = said(pod.affinity)
    if pod.priority_class_name:
        spec["priorityClassName"] = pod.priority_class_name
    if pod.runtime_class_name:
        spec["runtimeClassName"] = pod.runtime_class_name
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def _env(recipe: Recipe, pod: Pod, more: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The user's variables win over ours, except where ours wire the pods together."""
    ours = {"HOME": "/tmp", "OPD_TERMINATION_LOG": TERMINATION_LOG, **recipe.env}  # noqa: S108
    values: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in ours.items()}
    for variable in pod.env:
        secret = variable.secret_key_ref
        values[variable.name] = (
            {"valueFrom": {"secretKeyRef": secret.model_dump()}} if secret else {"value": variable.value}
        )
    wired = {str(variable["name"]) for variable in more}
    plain = [{"name": name, **value} for name, value in sorted(values.items()) if name not in wired]
    return [*plain, *(dict(variable) for variable in more)]


def _source(volume: Volume) -> dict[str, Any]:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    return {"secret": {"secretName": volume.secret}} if volume.secret else {"configMap": {"name": volume.config_map}}


def _probes(recipe: Recipe) -> dict[str, Any]:
    probes: dict[str, Any] = {}
    if recipe.readiness:
        probes["readinessProbe"] = _probe(recipe.readiness)
    if recipe.liveness:
        assert recipe.readiness is not None
        # Until it has worked once, slow is not dead.
        probes["startupProbe"] = _probe(replace(recipe.readiness, failures=_STARTUP_FAILURES))
        probes["livenessProbe"] = _probe(recipe.liveness)
    return probes


def _probe(probe: Probe) -> dict[str, Any]:
    how: dict[str, Any] = (
        {"exec": {"command": list(probe.argv)}}
        if probe.argv
        else {"httpGet": {"path": probe.http_path, "port": probe.port}}
    )
    return {**how, "timeoutSeconds": probe.timeout, "periodSeconds": probe.period, "failureThreshold": probe.failures}
