"""Where pods may run, in Kubernetes' own words (core/v1 Affinity), as far as the pods of one object need it."""

from typing import Annotated, Literal

from pydantic import Field

from opd_core.api.base import LabelKey, LabelValue, Model

Weight = Annotated[int, Field(ge=1, le=100)]
_MANY = 8  # bounds the cost of the rules on every expression


class NodeExpression(Model):
    key: LabelKey = Field(description="Node label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="How it is compared.")
    values: list[LabelValue] = Field(default_factory=list, max_length=_MANY, description="What it is compared with.")


class NodeTerm(Model):
    match_expressions: list[NodeExpression] = Field(
        min_length=1, max_length=_MANY, description="All of these must be so."
    )


class NodeSelector(Model):
    node_selector_terms: list[NodeTerm] = Field(min_length=1, max_length=_MANY, description="One of these must be so.")


class PreferredNode(Model):
    weight: Weight = Field(description="How much it counts, 1 to 100.")
    preference: NodeTerm = Field(description="What is preferred.")


class NodeAffinity(Model):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(
        default=None, description="Nodes that are good enough."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredNode] = Field(
        default_factory=list, max_length=_MANY, description="Nodes that are better."
    )


class LabelExpression(Model):
    key: LabelKey = Field(description="Pod label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="How it is compared.")
    values: list[LabelValue] = Field(default_factory=list, max_length=_MANY, description="What it is compared with.")


class LabelSelector(Model):
    match_labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, max_length=_MANY, description="Labels of the pods."
    )
    match_expressions: list[LabelExpression] = Field(
        default_factory=list, max_length=_MANY, description="All of these must be so."
    )


class PodTerm(Model):
    label_selector: LabelSelector = Field(description="Pods of the same namespace.")
    topology_key: LabelKey = Field(
        description="Node label whose equal values mean the same place, e.g. kubernetes.io/hostname."
    )


class PreferredPods(Model):
    weight: Weight = Field(description="How much it counts, 1 to 100.")
    pod_affinity_term: PodTerm = Field(description="What is preferred.")


class PodAffinity(Model):
    required_during_scheduling_ignored_during_execution: list[PodTerm] = Field(
        default_factory=list, max_length=_MANY, description="Places that are good enough."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredPods] = Field(
        default_factory=list, max_length=_MANY, description="Places that are better."
    )


class Affinity(Model):
    node_affinity: NodeAffinity | None = Field(default=None, description="By the labels of nodes.")
    pod_affinity: PodAffinity | None = Field(default=None, description="Near these pods.")
    pod_anti_affinity: PodAffinity | None = Field(default=None, description="Away from these pods.")
