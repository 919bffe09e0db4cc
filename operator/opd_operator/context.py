"""What the builders of one distillation share. Pure."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from opd_core.api.digests import digest, said
from opd_core.api.teachers import trained_teachers
from opd_core.api.training import Method
from opd_core.api.types import API_VERSION, KIND, OPDDistillation, Spec
from opd_core.roles import HUB_REWARDS, Place
from opd_core.uris import parse

from opd_operator import names
from opd_operator.pods import CLAIMS, SPEC_FILE, place
from opd_operator.settings import Settings

Manifest = dict[str, Any]

# What a role does not read; changing it leaves the role's pods alone.
_NOT_READ: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    names.TEACHERS: {
        "training": ("rounds", "imagesPerTask", "microBatchSize", "seed", "method", "sampler", "objective", "fakeScore",
                     "reinforcement", "passes", "optimizer", "ema", "gradientCheckpointing", "nodes",
                     "processesPerNode", "deepspeed", "checkpoint", "pod"),
        "evaluation": ("everyRounds", "promptsPerTask", "seed", "batchSize", "guidanceScale", "trueCfgScale",
                       "sampler", "gate", "pod"),
        "teacherServing": ("replicas", "pod"),
    },
    names.TEACH: {"training": ("pod",), "evaluation": ("gate", "pod"), "teacherServing": ("pod",)},
    names.TRAINER: {"training": ("pod",), "evaluation": ("gate", "pod"), "teacherServing": ("pod",)},
    # Its own pod says how many devices, and so how many ranks, it has.
    names.EVALUATOR: {"training": ("pod",), "teacherServing": ("pod",)},
}  # fmt: skip


def read_by(role: str, spec: Spec) -> Manifest:
    """What a role reads of a spec, beyond the defaults."""
    content = said(spec)
    read = {key: value for key, value in content.items() if key not in ("endpoint", "runPolicy", "suspend")}
    # Where a trained teacher is depends on the prompts that are held out of its own.
    kept = ("promptsPerTask", "seed") if trained_teachers(spec) else ()
    if role == names.TEACHERS:
        read.pop("rewardServers", None)
    for part, fields in _NOT_READ[role].items():
        if part in read:
            gone = {field for field in fields if part != "evaluation" or field not in kept}
            read[part] = {key: value for key, value in read[part].items() if key not in gone}
    read["training"].setdefault("rounds", 1)  # required, whoever reads it
    return read


def teachers_revision(distillation: OPDDistillation, image: str) -> str:
    """Names everything of a spec that the teacher servers' pods depend on."""
    spec = distillation.spec
    return digest(read_by(names.TEACHERS, spec), said(spec.teacher_serving.pod), image)[:8]


class Context:
    """Nothing in it changes but the ConfigMaps found to be needed."""

    def __init__(
        self, obj: Mapping[str, Any], distillation: OPDDistillation, run: Mapping[str, Any], settings: Settings
    ) -> None:
        self.obj, self.distillation, self.run, self.settings = obj, distillation, run, settings
        self.name, self.spec = distillation.metadata.name, distillation.spec
        self.namespace: str = obj["metadata"]["namespace"]
        self.content = said(distillation.spec)
        output = parse(self.spec.student.output.uri)
        self.output_claim = output.place
        self.runs = CLAIMS / output.place / f"{output.path}.runs"
        self.config_maps: dict[str, Manifest] = {}

    def place(self, work: PurePosixPath) -> Place:
        return place(self.settings.python, self.settings.device, work)

    @property
    def run_folder(self) -> PurePosixPath:
        return self.runs / str(self.run["key"])

    def remote(self, role: str) -> bool:
        """Whether a role fetches something over HTTPS: from a hub, from a bucket, or the weights of rewards."""
        scores = role in (names.TEACH, names.EVALUATOR) or (
            role == names.TRAINER
            and (bool(self.spec.evaluation.every_rounds) or self.spec.training.method == Method.RL)
        )
        rewards = {reward for teacher in self.spec.teachers for reward in teacher.rewards}
        served = {servers.reward for servers in self.spec.reward_servers}
        return _remote(self.content) or (scores and not HUB_REWARDS.isdisjoint(rewards - served))

    def reward_ports(self, role: str) -> set[int]:
        """Ports of the reward servers that a role asks."""
        if role in (names.TEACHERS, names.ENDPOINT):
            return set()
        return {_port(url) for servers in self.spec.reward_servers for url in servers.urls}

    @property
    def account(self) -> str:
        return f"{self.name}-workload"

    def service_account(self) -> Manifest:
        secrets = [{"name": name} for name in self.settings.pull_secrets]
        more = {"imagePullSecrets": secrets} if secrets else {}
        return self.child(
            "v1", "ServiceAccount", self.account, names.SHARED, automountServiceAccountToken=False, **more
        )

    def config_map(self, role: str) -> str:
        """Name of the ConfigMap that holds the spec as this role reads it, beyond the defaults."""
        spec = read_by(role, self.spec)
        content = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": self.name}, "spec": spec}
        name = f"{self.name}-{role}-{digest(content)[:8]}"
        text = json.dumps(content, indent=1, sort_keys=True)
        self.config_maps[name] = self.child("v1", "ConfigMap", name, role, immutable=True, data={SPEC_FILE: text})
        return name

    def pod_labels(self, role: str) -> dict[str, str]:
        return {**names.labels(self.name, role), names.OWNER: self.obj["metadata"]["uid"]}

    @property
    def queue_labels(self) -> dict[str, str]:
        labels = self.obj["metadata"].get("labels") or {}
        return {key: labels[key] for key in names.QUEUE_LABELS if key in labels}

    def child(self, api_version: str, kind: str, name: str, role: str, **content: Any) -> Manifest:
        metadata = {"name": name, "namespace": self.namespace, "labels": names.labels(self.name, role)}
        return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _remote(value: Any) -> bool:
    """Whether a URI of the spec leaves the cluster; what a pod's environment says is no URI of ours."""
    if isinstance(value, dict):
        return any(_remote(item) for key, item in value.items() if key != "pod")
    if isinstance(value, list):
        return any(_remote(item) for item in value)
    return isinstance(value, str) and value.startswith(("hf://", "s3://"))


def service_ports(ports: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, "port": port, "targetPort": port, "protocol": "TCP"} for name, port in ports.items()]
