"""What every role's pods have in common."""

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from opd_core.api import sentences
from opd_core.api.affinity import Affinity
from opd_core.api.base import LabelKey, LabelValue, LocalName, LongText, Model, ShortText


def _written_as_number(value: Any) -> Any:
    """Kubernetes' quantities may be written `cpu: 2`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Quantity = Annotated[
    str,
    Field(max_length=64, pattern=sentences.QUANTITY_PATTERN, json_schema_extra={"x-kubernetes-int-or-string": True}),
    BeforeValidator(_written_as_number),
]
ClassName = Annotated[str, Field(max_length=253, pattern=sentences.CLASS_PATTERN)]

_SUFFIXES = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = "KMGTPE"


def amount(quantity: str) -> Decimal:
    """The number that a quantity stands for: 0.5 for 500m, 2**30 for 1Gi."""
    if quantity.endswith("i"):
        return Decimal(quantity[:-2]) * Decimal(2 ** (10 + 10 * _BINARY.index(quantity[-2])))
    suffix = quantity[-1] if quantity[-1] in _SUFFIXES else ""
    return Decimal(quantity.removesuffix(suffix)).scaleb(_SUFFIXES[suffix])


def devices(quantity: str | None) -> int | None:
    """The whole number that a quantity of devices is, as the API server's rules read it."""
    return int(quantity) if quantity and quantity.isdecimal() and int(quantity) < 2**63 else None


class SecretKey(Model):
    name: LocalName = Field(description="A Secret of the object's own namespace.")
    key: Annotated[str, Field(max_length=253, pattern=sentences.DATA_KEY_PATTERN)] = Field(
        description="The key whose value is taken."
    )


class EnvVar(Model):
    name: Annotated[str, Field(max_length=253, pattern=sentences.VARIABLE_PATTERN)] = Field(
        description="Name of the environment variable."
    )
    value: LongText = Field(default="", description="Its value.")
    secret_key_ref: SecretKey | None = Field(
        default=None, description="Where its value is instead, e.g. HF_TOKEN for a gated model."
    )


class Volume(Model):
    """Something more to read, or a place to write: exactly one of claim, secret and configMap."""

    mount_path: Annotated[str, Field(max_length=253, pattern=sentences.MOUNT_PATTERN)] = Field(
        description="Where the container finds it."
    )
    read_only: bool = Field(default=True, description="Whether it is only read.")
    claim: LocalName | None = Field(default=None, description="A PersistentVolumeClaim of the same namespace.")
    secret: LocalName | None = Field(default=None, description="A Secret of the same namespace.")
    config_map: LocalName | None = Field(default=None, description="A ConfigMap of the same namespace.")


_MANY = 8


class Resources(Model):
    requests: dict[LabelKey, Quantity] = Field(
        default_factory=dict, max_length=_MANY, description="Resources the pod is scheduled by, e.g. cpu, memory."
    )
    limits: dict[LabelKey, Quantity] = Field(
        default_factory=dict, max_length=_MANY, description="Resources the pod may use at most, e.g. nvidia.com/gpu."
    )


class Toleration(Model):
    key: Annotated[str, Field(max_length=253, pattern=sentences.TAINT_KEY_PATTERN)] = Field(
        default="", description="Taint key; empty with operator Exists matches all taints."
    )
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How key and value are compared.")
    value: LabelValue = Field(default="", description="Taint value.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="", description="Taint effect; empty matches all."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="How long NoExecute is tolerated."
    )


class Pod(Model):
    """What a platform engineer may say about the pods of one role."""

    image: ShortText = Field(default="", description="Container image; empty: the operator's image for this role.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the image is pulled."
    )
    resources: Resources = Field(default_factory=Resources, description="Requests and limits of the main container.")
    node_selector: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, max_length=32, description="Node labels that the pods need."
    )
    tolerations: list[Toleration] = Field(default_factory=list, max_length=32, description="Taints that are accepted.")
    affinity: Affinity | None = Field(default=None, description="Where the pods may and should run.")
    env: list[EnvVar] = Field(default_factory=list, max_length=64, description="Extra environment variables.")
    volumes: list[Volume] = Field(default_factory=list, max_length=16, description="Volumes beside those of the spec.")
    priority_class_name: ClassName = Field(default="", description="PriorityClass of the pods.")
    runtime_class_name: ClassName = Field(default="", description="RuntimeClass of the pods, e.g. nvidia.")
