"""What operator, trainer, teacher servers and endpoint export, as they declare it."""

from collections.abc import Iterator
from dataclasses import dataclass

from opd_operator.cache import Cache
from opd_operator.metrics import Metrics as OperatorMetrics
from opd_operator.queue import WorkQueue
from opd_serving.endpoint.metrics import Metrics as EndpointMetrics
from opd_serving.teacher.metrics import METRICS as TEACHER_METRICS
from opd_trainer.metrics import Metrics as TrainerMetrics
from prometheus_client import CollectorRegistry

SCRAPED = ("namespace", "name", "role", "pod")  # labels that the chart's monitors give to what pods export


@dataclass(frozen=True)
class Series:
    """One series, or the three of a histogram, under the name by which a query finds it."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def names(self) -> tuple[str, ...]:
        suffixes = ("_bucket", "_sum", "_count") if self.type == "histogram" else ("",)
        return tuple(self.name + suffix for suffix in suffixes)


def operator() -> list[Series]:
    return list(_declared(OperatorMetrics(Cache(), WorkQueue()).registry))


def trainer() -> list[Series]:
    return list(_declared(TrainerMetrics([], 1).registry))


def teachers() -> list[Series]:
    """Beside those of Triton."""
    return [Series(each.name, each.kind, (), each.meaning) for each in TEACHER_METRICS]


def endpoint() -> list[Series]:
    return list(_declared(EndpointMetrics().registry))


def _declared(registry: CollectorRegistry) -> Iterator[Series]:
    # prometheus_client has no public way to ask a metric for its labels before it has a sample.
    for collector in registry._collector_to_names:
        for family in collector.collect():
            labels: tuple[str, ...] = getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ())
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield Series(name, family.type, tuple(labels), family.documentation)
