"""What the person who installs the operator decides, once for all objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """`images`: default image by role (teachers, trainer, endpoint); the evaluator runs in the trainer's."""

    images: Mapping[str, str]
    device: str = "auto"
    python: str = "/opt/opd/bin/python"
    namespaces: tuple[str, ...] = ()  # none: all of them
    metrics_port: int = 8080
    probe_port: int = 8081
    leader_election: bool = True
    lease_name: str = "diffusion-opd-operator"
    lease_namespace: str = "default"
    workers: int = 8
    pull_secrets: tuple[str, ...] = ()  # Secrets with which the pods of distillations pull their images
    fixed_user: bool = True  # of the pods of distillations; else the cluster gives them theirs
    network_policies: bool = True  # of distillations
    extra_egress: tuple[Mapping[str, Any], ...] = ()  # NetworkPolicyEgressRules that each of these policies has, too
    resync_seconds: float = 300.0  # between two full listings

    @property
    def installation(self) -> str:
        """Names this operator: its replicas share the lease, another release has another one."""
        return f"{self.lease_namespace}/{self.lease_name}"
