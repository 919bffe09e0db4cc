"""Two managers that want different things do not fight as fast as they can."""

from opd_operator import names
from opd_operator.contest import Contest


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
