"""The scheduler, as a pure function: every sample finishes, in order, and nobody starves."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from opd_serving.endpoint import scheduler
from opd_serving.endpoint.scheduler import Sample, State

arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.integers(1, 6), st.booleans()), min_size=1, max_size=24
)


@given(arrivals, st.integers(1, 5))
def test_every_sample_makes_its_steps_in_order_and_leaves_or_is_dropped(plan, max_batch_size):
    """Samples arrive at any tick; some are dropped after their first step."""
    waiting = {id: (tick, Sample(id, group, steps), gone) for id, (tick, group, steps, gone) in enumerate(plan)}
    dropped = {id for id, (_, _, gone) in waiting.items() if gone}
    made = {id: [] for id in waiting}
    state, finished, tick = State(), set(), 0
    while waiting or state.samples:
        arrived = [sample for at, sample, _ in waiting.values() if at <= tick]
        waiting = {id: entry for id, entry in waiting.items() if entry[0] > tick}
        state = scheduler.admit(state, arrived)
        batch = scheduler.plan(state, max_batch_size)
        assert len(batch) <= max_batch_size
        assert bool(batch) == bool(state.samples)
        assert len({sample.group for sample in batch}) <= 1
        for sample in batch:
            made[sample.id].append(sample.step)
        if batch:
            state, done = scheduler.advance(state, batch)
            finished |= {sample.id for sample in done}
        state = scheduler.drop(state, {id for id in dropped if made[id]})
        tick += 1
        assert tick < 1000
    for id, (_, _, steps, gone) in enumerate(plan):
        assert made[id] == (list(range(steps)) if not gone else [0])
        assert (id in finished) == (not gone or steps == 1)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(2, 50)), min_size=1, max_size=30), st.integers(1, 4))
def test_no_group_waits_longer_than_one_tick_of_each_other_group(samples, max_batch_size):
    state = scheduler.admit(State(), [Sample(id, group, steps) for id, (group, steps) in enumerate(samples)])
    served = dict.fromkeys((group for group, _ in samples), 0)
    tick = 0
    while batch := scheduler.plan(state, max_batch_size):
        tick += 1
        alive = {sample.group for sample in state.samples}
        assert all(tick - served[group] <= len(served) for group in alive)
        served[batch[0].group] = tick
        state, _ = scheduler.advance(state, batch)


def test_within_a_group_the_oldest_go_first_and_newcomers_fill_the_batch():
    state = scheduler.admit(State(), [Sample(0, "a", 2), Sample(1, "a", 9)])
    state, _ = scheduler.advance(state, scheduler.plan(state, 2))
    state = scheduler.admit(state, [Sample(2, "a", 9)])
    assert [sample.id for sample in scheduler.plan(state, 2)] == [0, 1]
    state, finished = scheduler.advance(state, scheduler.plan(state, 2))
    assert finished == (replace(Sample(0, "a", 2), step=2),)
    assert [(sample.id, sample.step) for sample in scheduler.plan(state, 2)] == [(1, 2), (2, 0)]
