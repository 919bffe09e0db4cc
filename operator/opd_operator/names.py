"""Names, labels and ports that all parts of the operator agree on."""

import hashlib
from collections.abc import Mapping

from opd_core.api.types import KIND

GROUP, VERSION, PLURAL = "opd.dev", "v1alpha1", "opddistillations"
MANAGER = "opd-operator"  # of server-side apply: the owner of every field that the operator sets
MANAGED_BY = "opd.dev/operator"  # value of spec.managedBy that means this operator

DISTILLATION = "opd.dev/distillation"
ROLE = "opd.dev/role"
REVISION = "opd.dev/revision"
TEACHER = "opd.dev/teacher"  # that a Job trains
OWNER = "opd.dev/owner"  # uid of the distillation, on pods: their ownerReference names the Job or ReplicaSet

TEACH, TEACHERS, TRAINER, EVALUATOR, ENDPOINT = "teach", "teachers", "trainer", "evaluator", "endpoint"
SHARED = "workload"  # role of what all pods need

# The container of a role's program; whatever else is in its pods was put there by somebody else.
CONTAINERS = {TEACH: "teach", TEACHERS: "teacher", TRAINER: "trainer", EVALUATOR: "evaluator", ENDPOINT: "endpoint"}

GRPC, HTTP, TRITON_METRICS = 8001, 8000, 8002
TRAINER_METRICS, RENDEZVOUS = 9090, 29500
ENDPOINT_HTTP, ENDPOINT_METRICS = 8000, 9090

# Of the distillation, handed on to what holds GPUs: Kueue admits plain Jobs and Deployments by them.
QUEUE_LABELS = ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")

MANIFEST = "opd.dev/manifest"  # annotation: digest of what was applied, so that what is left out later is removed
INSTALLATION = "opd.dev/installation"  # annotation: the operator that applied it, as namespace and name of its lease
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"


def selector(name: str, role: str) -> dict[str, str]:
    """Labels that find the pods of one role of one object."""
    return {DISTILLATION: name, ROLE: role}


def labels(name: str, role: str) -> dict[str, str]:
    """Labels of every child."""
    return {
        "app.kubernetes.io/name": "diffusion-opd",
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": role,
        **selector(name, role),
    }


def owner(obj: Mapping[str, object]) -> dict[str, object]:
    """The reference by which the garbage collector finds the children of `obj`."""
    metadata = obj["metadata"]
    assert isinstance(metadata, Mapping)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def teach(name: str, index: int, attempt: int, number: int) -> str:
    """One Job per start of a teacher's training; `index`: of the teacher in the spec."""
    return f"{name}-teach-{index}-{_short(f'{attempt}-{number}', 8)}"


def teachers(name: str, index: int) -> str:
    return f"{name}-teachers-{index}"


def trainer(name: str, attempt: int, number: int) -> str:
    """One Job per start of the trainer: `number` counts the starts of this attempt."""
    return f"{name}-trainer-{_short(f'{attempt}-{number}', 9)}"


def evaluator(name: str, key: str, number: int) -> str:
    return f"{name}-evaluator-{key[:6]}-{_short(str(number), 3)}"


def _short(numbers: str, most: int) -> str:
    """Numbers, or so many that a pod's name would not fit 63 characters, a digest of them."""
    return numbers if len(numbers) <= most else hashlib.sha256(numbers.encode()).hexdigest()[:most]


def endpoint(name: str, revision: str) -> str:
    return f"{name}-endpoint-{revision}"


def host(name: str, namespace: str) -> str:
    """Where the endpoint answers inside the cluster, whatever revision it is."""
    return f"{name}-endpoint.{namespace}.svc:{ENDPOINT_HTTP}"
