"""Two managers that want different things do not fight as fast as they can."""

import re
from collections.abc import Callable
from typing import Any

from opd_operator import names
from opd_operator.contest import Contest

from tests.operator.live import Api, Operator, wait_for


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def manifest(digest: str = "a", name: str = "x") -> dict[str, object]:
    metadata = {"namespace": "team", "name": name, "annotations": {names.MANIFEST: digest}}
    return {"kind": "Deployment", "metadata": metadata}


def fight(contest: Contest, clock: Clock, seconds: float, every: float = 0.1) -> int:
    """How often the manifest is applied while somebody changes it back all the time."""
    end, writes = clock.now + seconds, 0
    while clock.now < end:
        pause = contest.pause(manifest())
        writes += pause == 0
        clock.now += pause or every
    return writes


def test_a_few_corrections_come_at_once() -> None:
    clock = Clock()
    contest = Contest(clock)
    assert [contest.pause(manifest()) for _ in range(5)] == [0.0] * 5


def test_a_fight_becomes_slower_and_slower_and_never_ends_in_silence() -> None:
    clock = Clock()
    contest = Contest(clock)
    assert fight(contest, clock, 60) < 15
    assert 10 <= fight(contest, clock, 3600) < 25


def test_another_manifest_or_another_object_is_another_matter() -> None:
    clock = Clock()
    contest = Contest(clock)
    fight(contest, clock, 60)
    assert contest.pause(manifest("b")) == 0
    assert contest.pause(manifest(name="y")) == 0


def test_after_a_time_of_peace_it_is_forgotten() -> None:
    clock = Clock()
    contest = Contest(clock)
    fight(contest, clock, 60)
    clock.now += 1000
    assert [contest.pause(manifest()) for _ in range(5)] == [0.0] * 5


# ------------------------------------------------------------------------------------------------ rules of the cluster


def deployment(image: str = "trainer:1", *more: str) -> dict[str, Any]:
    containers = [{"name": name, "image": image} for name in ("trainer", *more)]
    return {**manifest(), "spec": {"replicas": 1, "containers": containers}}


def test_what_a_rule_of_the_cluster_makes_of_a_manifest_is_what_can_be_had() -> None:
    contest = Contest()
    changed = deployment("mirror/trainer:1", "proxy")
    contest.applied(deployment(), changed)
    assert contest.settled(deployment(), {**changed, "status": {"ready": 1}})
    assert contest.settled(deployment(), {**changed, "metadata": {**changed["metadata"], "uid": "u"}})  # type: ignore[dict-item]


def test_what_somebody_else_changes_afterwards_is_a_difference() -> None:
    contest = Contest()
    changed = deployment("mirror/trainer:1", "proxy")
    contest.applied(deployment(), changed)
    assert not contest.settled(deployment(), {**changed, "spec": {**changed["spec"], "replicas": 5}})
    assert not contest.settled(deployment(), deployment("elsewhere/trainer:1"))
    assert not contest.settled({**deployment(), **manifest("b")}, changed), "another manifest is applied"


def test_what_becomes_as_it_shall_be_is_not_remembered() -> None:
    contest = Contest()
    contest.applied(deployment(), deployment("mirror/trainer:1"))
    contest.applied(deployment(), {**deployment(), "status": {}})
    assert not contest.settled(deployment(), deployment("mirror/trainer:1"))
    for number in range(20_000):
        contest.applied({**deployment(), **manifest(name=str(number))}, deployment("mirror/trainer:1"))
    assert len(contest._made) == 10_000


# --------------------------------------------------------------------------------------------------- two releases


def test_two_operators_over_one_namespace_are_told_and_do_not_fight(api: Api, start: Callable[..., Operator]) -> None:
    """Their leases have different names, so that both lead; here their images differ, too."""
    both = [
        start(api, "--no-leader-election", f"--lease-name={name}", f"--teacher-image={name}:1")
        for name in ("first", "second")
    ]
    for each in both:
        each.ready()
    api.submit()

    def told() -> list[str]:
        conditions = {c["type"]: c["message"] for c in api.status().get("conditions", [])}
        return re.findall(r"the operator of (default/\w+), which looks after", conditions.get("TeachersReady", ""))

    assert wait_for(told, "a word about the other one")[0] in ("default/first", "default/second")
    logs = [each.log for each in both]
    for log, other in zip(logs, ("second", "first"), strict=True):
        said = f"the operator of default/{other}, which looks after this namespace, too"
        wait_for(lambda log=log, said=said: said in log.read_text(), said)
