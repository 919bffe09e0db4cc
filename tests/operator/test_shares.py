"""A canary's pods and traffic at one look, for every small rollout."""

import itertools

import pytest
from opd_operator.observe import DeploymentView
from opd_operator.shares import Look


def look(replicas: int, percent: int, ready: int, *, surge: int = 1, old: int = 0, made: int | None = None) -> Look:
    pods = ready if made is None else made
    new = DeploymentView("new", "endpoint", pods, ready, ready == pods, "b", None)
    return Look(replicas=replicas, surge=surge, percent=percent, new=new, old_ready=old, holding=old)


EVERY = [
    look(replicas, percent, ready, surge=surge, old=old, made=made)
    for replicas, percent, surge in itertools.product(range(1, 6), (1, 10, 50, 99, 100), (0, 1))
    for ready, made, old in itertools.product(range(replicas + 1), range(replicas + 1), range(replicas + 1))
    if ready <= made
]


def test_so_many_pods_as_there_are_places_for_and_no_more_than_its_step_asks_for():
    for each in EVERY:
        assert 0 <= each.grown <= each.share
        taken = each.new.replicas if each.new else 0
        assert each.holding + each.grown <= max(each.replicas + each.surge, each.holding + taken)


def test_who_answers_is_never_fewer_than_the_spec_allows():
    """Without a route what the old revision gives up is what of the new one is ready."""
    for each in EVERY:
        assert each.kept(each.ready) + each.ready >= each.floor
        assert 1 <= each.kept(each.ready) <= each.replicas


def test_no_more_traffic_than_its_pods_carry_and_its_step_aims_at():
    for each in EVERY:
        assert 0 <= each.carried <= each.percent
        assert each.enough or each.carried <= 100 * (each.ready + 1) / each.replicas
        assert each.ready or each.enough or each.carried == 0


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 100, 101, 250])
def test_what_carries_nothing_is_counted_in_whole_pods_of_whole_percents(replicas: int):
    one = look(replicas, 100, replicas)
    assert one.relieved(100) >= replicas
    assert [one.relieved(percent) for percent in range(101)] == sorted(one.relieved(percent) for percent in range(101))
    assert look(replicas, 100, replicas // 2).relieved(0) < max(1, -(-replicas // 100))


def test_a_canary_that_is_not_there_has_nothing_and_is_not_enough():
    gone = Look(replicas=2, surge=1, percent=0, new=None, old_ready=2, holding=2)
    assert (gone.enough, gone.carried, gone.grown, gone.of_ready) == (False, 0, 0, 0)
