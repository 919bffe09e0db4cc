"""The cache: never behind what it has seen, and no child in the wrong family."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd_core.api.types import API_VERSION, KIND
from opd_operator import names, watch
from opd_operator.cache import Cache, Key
from opd_operator.kube import BY_KIND, Kube, Page
from opd_operator.metrics import Metrics
from opd_operator.queue import WorkQueue
from opd_operator.watch import DeadWatchError, Watches, fill, resync

KEY = ("team", "tiny")


def distillation(uid: str = "u1", version: int = 1, name: str = "tiny", **more: Any) -> dict[str, Any]:
    metadata = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version)}
    return {"kind": KIND, "metadata": metadata, **more}


def child(
    name: str = "tiny-trainer", uid: str = "c1", version: int = 1, owner: str = "u1", kind: str = "Job", **more: Any
) -> dict[str, Any]:
    metadata = {
        "namespace": "team",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "ownerReferences": [{"apiVersion": API_VERSION, "kind": KIND, "name": "tiny", "uid": owner}],
    }
    return {"kind": kind, "metadata": metadata, **more}


def pod(owner: str = "u1", version: int = 1) -> dict[str, Any]:
    found = child("tiny-trainer-0", "p1", version, kind="Pod")
    found["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "tiny-trainer", "uid": "c1"}]
    found["metadata"]["labels"] = {names.OWNER: owner, names.DISTILLATION: "tiny"}
    return found


def stored(cache: Cache) -> Mapping[str, Any]:
    found = cache.get(KEY)
    assert found is not None
    return found


def versions(cache: Cache, uid: str = "u1") -> dict[str, str]:
    return {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in cache.children(distillation(uid))}


def test_an_older_event_does_not_overwrite_a_newer_object() -> None:
    cache = Cache()
    assert cache.put(distillation(version=10, status={"phase": "Running"})) == KEY
    assert cache.put(distillation(version=9)) is None
    assert stored(cache)["status"] == {"phase": "Running"}
    assert cache.put(child(version=100)) == KEY
    assert cache.put(child(version=99)) is None  # as numbers: "99" > "100" as text
    assert versions(cache) == {"tiny-trainer": "100"}


def test_the_same_version_again_is_no_news() -> None:
    cache = Cache()
    cache.put(distillation(version=5))
    cache.put(child(version=5))
    assert cache.put(distillation(version=5)) is None
    assert cache.put(child(version=5)) is None


@given(st.lists(st.integers(1, 30), min_size=1))
def test_whatever_the_order_of_events_the_newest_one_stays(order: list[int]) -> None:
    cache = Cache()
    for version in order:
        cache.put(child(version=version))
    assert versions(cache) == {"tiny-trainer": str(max(order))}


def test_an_object_made_again_under_its_old_name_adopts_nothing() -> None:
    cache = Cache()
    cache.put(distillation("u1", 1))
    cache.put(child(owner="u1"))
    cache.put(pod("u1"))
    cache.put(distillation("u2", 2))
    assert cache.children(distillation("u2")) == []
    assert len(cache.children(distillation("u1"))) == 2
    cache.put(child("tiny-trainer", "c2", 3, owner="u2"))
    assert [each["metadata"]["uid"] for each in cache.children(distillation("u2"))] == ["c2"]


def test_the_late_deletion_of_an_object_leaves_the_one_made_again() -> None:
    cache = Cache()
    cache.put(distillation("u1", 1))
    cache.put(distillation("u2", 5))
    cache.put(child(owner="u2"))
    assert cache.remove(distillation("u1", 4)) == KEY
    assert stored(cache)["metadata"]["uid"] == "u2"
    assert versions(cache, "u2") == {"tiny-trainer": "1"}


def test_the_late_deletion_of_a_child_leaves_the_one_made_again() -> None:
    cache = Cache()
    cache.put(child(uid="c1", version=1))
    cache.put(child(uid="c2", version=5))
    assert cache.remove(child(uid="c1", version=4)) == KEY
    assert versions(cache) == {"tiny-trainer": "5"}


def test_with_an_object_its_children_are_forgotten() -> None:
    cache = Cache()
    cache.put(distillation())
    cache.put(child())
    cache.put(pod())
    assert cache.remove(distillation(version=2)) == KEY
    assert list(cache) == []
    assert cache.children(distillation("u1")) == []


def test_a_child_that_is_deleted_concerns_its_distillation() -> None:
    cache = Cache()
    cache.put(child())
    assert cache.remove(child(version=2)) == KEY
    assert cache.children(distillation("u1")) == []


def test_a_pod_belongs_to_the_distillation_in_its_labels() -> None:
    cache = Cache()
    assert cache.put(pod("u7")) == KEY
    assert [each["kind"] for each in cache.children(distillation("u7"))] == ["Pod"]


def test_what_belongs_to_nobody_is_not_kept() -> None:
    cache, stranger = Cache(), child()
    stranger["metadata"]["ownerReferences"] = [{"kind": "CronJob", "name": "tiny", "uid": "u1"}]
    assert cache.put(stranger) is None
    assert cache.remove(stranger) is None
    assert cache.children(distillation("u1")) == []


def test_labels_alone_make_no_child_of_what_others_have_made() -> None:
    """They are copied with a manifest; the owner's reference is not given by accident."""
    cache, stranger = Cache(), child(kind="Service")
    stranger["metadata"]["ownerReferences"] = []
    stranger["metadata"]["labels"] = {names.OWNER: "u1", names.DISTILLATION: "tiny"}
    assert cache.put(stranger) is None
    assert cache.children(distillation("u1")) == []


def test_children_of_different_kinds_may_share_a_name() -> None:
    cache = Cache()
    cache.put(child("tiny-teachers-0", "a", kind="Service"))
    cache.put(child("tiny-teachers-0", "b", kind="Deployment"))
    assert len(cache.children(distillation("u1"))) == 2


def test_managed_fields_are_not_kept() -> None:
    cache, obj = Cache(), distillation()
    obj["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    cache.put(obj)
    assert "managedFields" not in stored(cache)["metadata"]


def listed(cache: Cache, kind: str, objects: list[dict[str, Any]], version: int) -> tuple[set[Key], int]:
    """Take over a complete list, an object a page. The keys it was news for, the newest version of what was news."""

    class Lists:
        async def pages(self, *_: object) -> AsyncIterator[Page]:
            for page in [[obj] for obj in objects] or [[]]:
                yield Page(page, version)

    news, newest = asyncio.run(fill(cast(Kube, Lists()), cache, Watches([BY_KIND[kind]])))
    return news, newest.get((kind, ""), 0)


def test_a_list_that_says_what_the_watches_said_is_no_news() -> None:
    cache = Cache()
    cache.put(distillation())
    cache.put(child())
    assert listed(cache, KIND, [distillation()], 9) == (set(), 0)
    assert listed(cache, "Job", [child()], 9) == (set(), 0)


def test_a_list_finds_what_the_watches_missed() -> None:
    cache = Cache()
    cache.put(child("changed", "a", 1))
    cache.put(child("deleted", "b", 2))
    cache.put(child("made-again", "c", 3))
    cache.put(child("a-service", "d", 3, kind="Service"))
    found = [child("changed", "a", 7), child("new", "e", 6), child("made-again", "f", 8)]
    assert listed(cache, "Job", found, 9) == ({KEY}, 8)
    assert versions(cache) == {"changed": "7", "new": "6", "made-again": "8", "a-service": "3"}
    assert listed(cache, "Job", found, 9) == (set(), 0)


def test_a_list_finds_deleted_distillations() -> None:
    cache = Cache()
    cache.put(distillation("u1", 1))
    cache.put(distillation("u2", 1, name="other"))
    assert listed(cache, KIND, [distillation("u1", 1)], 5) == ({("team", "other")}, 0)
    assert list(cache) == [KEY]


@pytest.mark.parametrize("namespaces", [("team", "other"), ()])
def test_a_dead_watch_is_not_hidden_by_that_of_another_namespace(
    namespaces: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all namespaces are watched together there is one watch, and newer events of others show that it lives."""
    monkeypatch.setattr(watch, "_LATE", 0.01)
    cache, watches = Cache(), Watches([BY_KIND["Job"]], namespaces)
    watches.saw("Job", "other", "90")

    class Lists:
        async def has(self, _: object) -> bool:
            return False

        async def pages(self, _: object, namespace: str, __: object) -> AsyncIterator[Page]:
            yield Page([child(version=50)] if namespace in ("team", "") else [], 95)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Kube]:
        yield cast(Kube, Lists())

    async def play() -> None:
        queue = WorkQueue[Key]()
        async with asyncio.timeout(1):
            await resync(connect, cache, queue, watches, Metrics(cache, queue), 0.01)

    if namespaces:
        with pytest.raises(DeadWatchError, match="of Job in team is open"):
            asyncio.run(play())
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(play())
    assert [each["metadata"]["name"] for each in cache.children(distillation("u1"))] == ["tiny-trainer"]


def test_what_was_made_after_the_list_is_not_taken_for_deleted() -> None:
    cache = Cache()
    cache.put(child("made-meanwhile", "a", 12))
    assert listed(cache, "Job", [], 10) == (set(), 0)
    assert versions(cache) == {"made-meanwhile": "12"}


def test_what_was_deleted_does_not_come_back_with_an_older_word() -> None:
    """The answer to a write, or a page of a list, may arrive after the watch has told of the deletion."""
    cache = Cache()
    cache.put(distillation())
    cache.put(child(version=5))
    cache.remove(child(version=6))
    assert cache.put(child(version=5)) is None
    assert listed(cache, "Job", [child(version=5)], 5) == (set(), 0)
    cache.remove(distillation(version=7))
    assert cache.put(distillation(version=7, status={"phase": "Starting"})) is None
    assert list(cache) == []


def test_the_memory_of_deleted_objects_is_bounded() -> None:
    cache = Cache()
    for number in range(30_000):
        cache.remove(child(uid=f"c{number}"))
    assert len(cache._gone) == 20_000


def test_another_namespace_owns_nothing_here() -> None:
    """Whoever may make pods elsewhere could write this object's uid into their labels."""
    cache, foreign = Cache(), pod("u1")
    foreign["metadata"]["namespace"] = "elsewhere"
    cache.put(distillation())
    cache.put(foreign)
    assert cache.children(distillation()) == []
