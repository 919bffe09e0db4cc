"""What the operator's port tells Prometheus: one series a fact, of the objects that exist."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from opd_operator.cache import Cache
from opd_operator.metrics import Metrics
from opd_operator.queue import WorkQueue
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

OWN = {"namespace": "research", "name": "tiny"}
STATUS: dict[str, Any] = {
    "phase": "Evaluating",
    "conditions": [
        {"type": "Trained", "status": "True", "reason": "Completed"},
        {"type": "Evaluated", "status": "False", "reason": "Running"},
    ],
    "progress": {"round": 30, "totalRounds": 40, "percentage": 75, "lastUpdateTime": "1970-01-01T01:00:00Z"},
    "checkpoint": {"round": 20},
    "stageTimes": {
        "Trained": {"startTime": "2026-01-01T00:00:00Z", "completionTime": "2026-01-01T00:10:00Z"},
        "Evaluated": {"startTime": "2026-01-01T00:10:00Z"},
    },
    "restarts": 2,
    "student": {
        "digest": "sha256:1",
        "scores": [
            {"task": "ocr", "reward": "ocr", "base": 0.1, "teacher": 0.9, "student": 0.8, "kept": 0.875},
            {"task": "ocr", "reward": "clipscore", "student": 0.5},
        ],
    },
    "endpoint": {"canary": {"revision": "b", "trafficPercent": 25}},
}


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def metrics(cache: Cache) -> Metrics:
    return Metrics(cache, WorkQueue())


def put(cache: Cache, version: int, status: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"namespace": "research", "name": "tiny", "uid": "1", "resourceVersion": str(version)}
    obj = {"kind": "OPDDistillation", "metadata": metadata, "status": status}
    assert cache.put(obj)
    return obj


def page(metrics: Metrics) -> list[Sample]:
    """Every sample of the page, as a scraper reads it."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return [sample for family in families for sample in family.samples]


def values(metrics: Metrics, series: str) -> dict[tuple[str, ...], float]:
    """Label values beside the object's, in the order of their names -> value."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label not in OWN): sample.value
        for sample in page(metrics)
        if sample.name == series
    }


def test_the_page_says_what_the_status_says(cache: Cache, metrics: Metrics) -> None:
    put(cache, 1, STATUS)
    assert values(metrics, "opd_info") == {("Evaluating", "sha256:1"): 1}
    assert values(metrics, "opd_condition") == {
        ("Completed", "True", "Trained"): 1,
        ("Running", "False", "Evaluated"): 1,
    }
    assert values(metrics, "opd_progress_ratio") == {(): 0.75}
    assert values(metrics, "opd_progress_timestamp_seconds") == {(): 3600}
    assert values(metrics, "opd_checkpoint_round") == {(): 20}
    assert values(metrics, "opd_stage_duration_seconds") == {("Trained",): 600}, "a stage that runs has no duration"
    assert values(metrics, "opd_restarts") == {("failure",): 2, ("disruption",): 0}
    assert values(metrics, "opd_eval_kept_ratio") == {("ocr", "ocr"): 0.875}
    assert values(metrics, "opd_canary_traffic_ratio") == {(): 0.25}
    assert values(metrics, "opd_eval_score") == {
        ("base", "ocr", "ocr"): 0.1,
        ("teacher", "ocr", "ocr"): 0.9,
        ("student", "ocr", "ocr"): 0.8,
        ("student", "clipscore", "ocr"): 0.5,
    }


def test_no_series_twice(cache: Cache, metrics: Metrics) -> None:
    """Prometheus drops a whole scrape for one duplicate."""
    put(cache, 1, STATUS)
    seen = Counter((sample.name, *sorted(sample.labels.items())) for sample in page(metrics))
    assert set(seen.values()) == {1}


def test_an_object_without_a_status_is_there(cache: Cache, metrics: Metrics) -> None:
    put(cache, 1, {})
    assert values(metrics, "opd_info") == {("", ""): 1}


def test_a_condition_leaves_no_series_of_what_it_was(cache: Cache, metrics: Metrics) -> None:
    put(cache, 1, STATUS)
    put(cache, 2, {"conditions": [{"type": "Evaluated", "status": "True", "reason": "Completed"}]})
    assert values(metrics, "opd_condition") == {("Completed", "True", "Evaluated"): 1}


BROKEN: list[dict[str, Any]] = [
    {"conditions": [{"type": "Ready"}]}, {"conditions": 7}, {"progress": {"round": "x", "totalRounds": 5}},
    {"stageTimes": {"Trained": {"startTime": "soon", "completionTime": "never"}}}, {"student": []},
    {"progress": {"lastUpdateTime": "0001-01-01T00:00:00+23:59"}},
    {"student": {"scores": [{"task": "a", "reward": "b", "kept": 10**400}]}},
]  # fmt: skip


@pytest.mark.parametrize("status", BROKEN, ids=range(len(BROKEN)))
def test_a_status_that_is_none_takes_nobody_elses_page(status: dict[str, Any], cache: Cache, metrics: Metrics) -> None:
    """Somebody has written it by hand, past the schema or before there was one."""
    put(cache, 1, status)
    other = {"namespace": "research", "name": "other", "uid": "2", "resourceVersion": "1"}
    cache.put({"kind": "OPDDistillation", "metadata": other, "status": STATUS})
    assert [s.labels["name"] for s in page(metrics) if s.name == "opd_progress_ratio"] == ["other"]


def test_an_evaluator_that_says_a_thing_twice_makes_one_series(cache: Cache, metrics: Metrics) -> None:
    put(cache, 1, {"student": {"scores": [{"task": "ocr", "reward": "ocr", "kept": kept} for kept in (0.1, 0.2)]}})
    assert [s.value for s in page(metrics) if s.name == "opd_eval_kept_ratio"] == [0.2]


def test_series_go_with_their_object(cache: Cache, metrics: Metrics) -> None:
    before = {sample.name for sample in page(metrics)}
    obj = put(cache, 1, STATUS)
    assert any(sample.labels.get("name") == "tiny" for sample in page(metrics))
    cache.remove(obj)
    assert not any(sample.labels.get("name") == "tiny" for sample in page(metrics))
    assert {sample.name for sample in page(metrics)} == before


def test_an_error_is_an_increase_from_the_first_one_on(metrics: Metrics) -> None:
    assert values(metrics, "controller_runtime_reconcile_total")[("opddistillation", "error")] == 0
    metrics.reconciled("error", 0.1, 0.2)
    assert values(metrics, "controller_runtime_reconcile_total")[("opddistillation", "error")] == 1


def test_the_queue_tells_how_much_waits_and_for_how_long(cache: Cache) -> None:
    now = 100.0
    queue = WorkQueue[tuple[str, str]](clock=lambda: now)
    metrics = Metrics(cache, queue)
    queue.add(("research", "tiny"))
    queue.add(("research", "other"))
    queue.add(("research", "tiny"))
    now = 107.0
    assert values(metrics, "workqueue_depth") == {(): 2}
    assert values(metrics, "workqueue_adds_total") == {(): 3}
    assert values(metrics, "workqueue_oldest_seconds") == {(): 7}
