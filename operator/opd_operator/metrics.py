"""Prometheus series of the operator. What describes an object is read from the cache at the scrape, so that a series
goes with its object; names shared with controller-runtime let existing dashboards work."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from opd_operator.observe import parse_time

if TYPE_CHECKING:
    from opd_operator.cache import Cache
    from opd_operator.queue import WorkQueue

log = logging.getLogger("opd_operator")

_NAME = "opddistillation"
_RESULTS = ("success", "conflict", "error", "panic")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ApiMetrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        labels = ("verb", "resource", "code")
        self._requests = Counter("opd_api_requests", "Requests to the API server.", labels, registry=registry)
        self._seconds = Histogram(
            "opd_api_request_duration_seconds", "Time of a request to the API server.", ("verb",), registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip

    def called(self, method: str, plural: str, code: str, seconds: float) -> None:
        self._requests.labels(method, plural, code).inc()
        self._seconds.labels(method).observe(seconds)


class Metrics:
    """Every series of this process, in a registry of its own."""

    def __init__(self, cache: "Cache", queue: "WorkQueue[tuple[str, str]]") -> None:
        self.registry = registry = CollectorRegistry()
        self.api = ApiMetrics(registry)
        self.reconciles = Counter(
            "controller_runtime_reconcile", "Reconciliations by result.", ("controller", "result"), registry=registry
        )
        for result in _RESULTS:  # a first error is an increase only of what was there
            self.reconciles.labels(_NAME, result)
        self.reconcile_seconds = Histogram(
            "controller_runtime_reconcile_time_seconds", "Time of a reconciliation.", ("controller",),
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "workqueue_queue_duration_seconds", "Time in the queue.", ("name",), registry=registry, buckets=_SECONDS
        )
        self.resync_news = Counter(
            "opd_resync_news", "Objects that a full listing knew better than the watches.", registry=registry
        )
        self.leader = Gauge("opd_leader", "1 while this process holds the lease.", registry=registry)
        build = Gauge("opd_build_info", "1 for the version that runs.", ("version",), registry=registry)
        build.labels(metadata.version("diffusion-opd")).set(1)
        registry.register(_Queue(queue))
        registry.register(_Objects(cache))
        ProcessCollector(registry=registry)

    def reconciled(self, result: str, seconds: float, waited: float) -> None:
        self.reconciles.labels(_NAME, result).inc()
        self.reconcile_seconds.labels(_NAME).observe(seconds)
        self.queue_seconds.labels(_NAME).observe(waited)


class _Queue(Collector):
    """The queue counts for itself."""

    def __init__(self, queue: "WorkQueue[tuple[str, str]]") -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("workqueue_depth", "Objects that wait for a worker.", labels=["name"])
        depth.add_metric([_NAME], len(self._queue))
        adds = CounterMetricFamily("workqueue_adds", "Objects added to the queue since the start.", labels=["name"])
        adds.add_metric([_NAME], self._queue.adds)
        oldest = GaugeMetricFamily(
            "workqueue_oldest_seconds", "How long the head of the queue has been waiting.", labels=["name"]
        )
        oldest.add_metric([_NAME], self._oldest())
        yield from (depth, adds, oldest)

    def _oldest(self) -> float:
        try:
            return self._queue.oldest_seconds
        except LookupError:  # scrapes have a thread of their own: a worker took the head in between
            return 0.0


class _Objects(Collector):
    """Series about every distillation, as its status has them; with one value a condition, whatever its reason."""

    def __init__(self, cache: "Cache") -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        families = {
            name: GaugeMetricFamily(name, text, labels=["namespace", "name", *labels])
            for name, text, *labels in _OBJECT_SERIES
        }
        for key in self._cache:
            obj = self._cache.get(key) or {}  # scrapes have a thread of their own: it may have gone in between
            for (name, *labels), value in self._of(key, obj.get("status") or {}).items():
                families[name].add_metric([*key, *labels], value)
        yield from families.values()

    def _of(self, key: tuple[str, str], status: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        """By series and labels, each once. A status that is none, as somebody may have written it by hand, has none: it
        takes nobody else's page."""
        try:
            return {(name, *map(str, labels)): float(value) for name, labels, value in _samples(status)}
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            log.warning("%s/%s: its status has no metrics: %r", *key, error)
            return {}


_OBJECT_SERIES = (
    ("opd_info", "1 for each distillation, with its phase and the digest of its student.", "phase", "student"),
    ("opd_condition", "1 for each condition, with what it is and why.", "type", "status", "reason"),
    ("opd_progress_ratio", "Rounds done, of all."),
    ("opd_progress_timestamp_seconds", "When the trainer last told of another round."),
    ("opd_checkpoint_round", "Round of the newest checkpoint."),
    ("opd_stage_duration_seconds", "Time of a finished stage.", "stage"),
    ("opd_restarts", "Starts again in this run, by cause.", "cause"),
    ("opd_eval_score", "Mean reward of base, teacher or student.", "task", "reward", "model"),
    ("opd_eval_kept_ratio", "Share of the teacher's gain over the base that the student kept.", "task", "reward"),
    ("opd_canary_traffic_ratio", "Share of the traffic that a new student gets during its rollout."),
)


def _samples(status: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str], float]]:
    """(series, labels beside the object's, value) of what one status says."""
    student, progress = status.get("student", {}), status.get("progress", {})
    yield "opd_info", (status.get("phase", ""), student.get("digest", "")), 1
    for item in status.get("conditions", []):
        yield "opd_condition", (item["type"], item["status"], item.get("reason", "")), 1
    if progress.get("totalRounds"):
        yield "opd_progress_ratio", (), progress["round"] / progress["totalRounds"]
    if "lastUpdateTime" in progress:
        yield "opd_progress_timestamp_seconds", (), parse_time(progress["lastUpdateTime"])
    if "round" in status.get("checkpoint", {}):
        yield "opd_checkpoint_round", (), status["checkpoint"]["round"]
    for stage, times in status.get("stageTimes", {}).items():
        if "completionTime" in times:
            seconds = parse_time(times["completionTime"]) - parse_time(times["startTime"])
            yield "opd_stage_duration_seconds", (stage,), seconds
    for cause, field in (("failure", "restarts"), ("disruption", "disruptions")):
        yield "opd_restarts", (cause,), status.get(field, 0)
    for row in student.get("scores", []):
        for model in ("base", "teacher", "student"):
            if model in row:
                yield "opd_eval_score", (row["task"], row["reward"], model), row[model]
        if "kept" in row:
            yield "opd_eval_kept_ratio", (row["task"], row["reward"]), row["kept"]
    if canary := status.get("endpoint", {}).get("canary"):
        yield "opd_canary_traffic_ratio", (), canary.get("trafficPercent", 0) / 100
