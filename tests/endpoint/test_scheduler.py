"""The scheduler, as pure functions: every sample finishes, in order, nobody starves, and turns go by work and client."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd_serving.endpoint import scheduler


@dataclass(eq=False)
class Sample:
    """An image of `pixels`, guided or not, that needs `left` more steps."""

    client: str
    group: str
    left: int
    pixels: int = 1
    forwards: int = 1
    made: int = 0

    @property
    def work(self) -> int:
        return self.pixels * self.forwards


class Queue:
    """Plays ticks and adds up what they cost."""

    def __init__(self, max_images: int, max_pixels: int = 1 << 40) -> None:
        self.max_images, self.max_pixels = max_images, max_pixels
        self.samples: list[Sample] = []
        self.served: scheduler.Served = {}
        self.work = 0

    def tick(self) -> list[Sample]:
        batch = scheduler.plan(self.samples, self.served, self.max_images, self.max_pixels)
        if batch:
            self.served = scheduler.charge(self.served, self.samples, batch)
        for sample in batch:
            sample.left, sample.made = sample.left - 1, sample.made + 1
            self.work += sample.work
        self.samples = [sample for sample in self.samples if sample.left]
        return batch

    def work_until(self, wanted: Sample) -> int:
        before = self.work
        while wanted.left:
            self.tick()
        return self.work - before


arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("xyz"), st.sampled_from("abc"), st.integers(1, 6), st.booleans()),
    min_size=1,
    max_size=24,
)


@given(arrivals, st.integers(1, 5), st.integers(1, 40))
def test_every_sample_makes_its_steps_or_is_dropped(plan, max_images, max_pixels):
    """Samples arrive at any tick; some are dropped after their first step."""
    pixels = {"a": 1, "b": 4, "c": 16}
    waiting = [(tick, Sample(client, group, steps, pixels[group]), gone) for tick, client, group, steps, gone in plan]
    steps = {id(sample): sample.left for _, sample, _ in waiting}
    everybody, queue, tick = list(waiting), Queue(max_images, max_pixels), 0
    while waiting or queue.samples:
        queue.samples += [sample for at, sample, _ in waiting if at <= tick]
        waiting = [entry for entry in waiting if entry[0] > tick]
        there = bool(queue.samples)
        batch = queue.tick()
        assert bool(batch) == there
        assert len(batch) <= max_images
        assert len(batch) <= 1 or sum(sample.pixels for sample in batch) <= max_pixels
        assert len({sample.group for sample in batch}) <= 1
        dropped = {id(sample) for _, sample, gone in everybody if gone and sample.made}
        queue.samples = [sample for sample in queue.samples if id(sample) not in dropped]
        tick += 1
        assert tick < 1000
    for _, sample, gone in everybody:
        assert sample.made == (1 if gone else steps[id(sample)])


@pytest.mark.parametrize("others", [15, 63])
@pytest.mark.parametrize("larger", [1, 2, 4])
def test_beside_a_client_with_many_sizes_a_request_takes_at_most_three_times_its_time_alone(others, larger):
    """Counted in work; 41 times, when sizes took turns whatever their client and their cost."""
    queue = Queue(16)
    queue.samples = [Sample("greedy", f"size {i}", 100, 1000 * larger + i, 2) for i in range(others)]
    for _ in range(50):
        queue.tick()
    mine = Sample("modest", "mine", 4, 1000, 2)
    alone = mine.left * mine.work
    queue.samples.append(mine)
    assert queue.work_until(mine) <= 3 * alone


def test_a_large_image_gets_as_much_work_as_a_small_one_not_as_many_turns():
    queue = Queue(1)
    small, large = Sample("small", "s", 1000, 1), Sample("large", "l", 1000, 16)
    queue.samples = [large, small]
    for _ in range(170):
        queue.tick()
    assert abs(small.made * small.work - large.made * large.work) <= 16


def test_a_client_of_many_images_and_one_of_few_share_the_work():
    queue = Queue(4)
    many, few = [Sample("many", "s", 100) for _ in range(40)], [Sample("few", "t", 100) for _ in range(4)]
    queue.samples = [*many, *few]
    for _ in range(100):
        queue.tick()
    assert sum(sample.made for sample in few) == pytest.approx(sum(sample.made for sample in many), abs=8)


def test_room_in_a_batch_goes_to_others_who_then_wait_no_longer_than_for_what_they_had():
    """One image of "a" leaves 15 places to "b" for 200 ticks. Then "a" wants another size: "b" has to wait its turn,
    and not until "a" has had as much."""
    queue = Queue(16)
    queue.samples = [Sample("a", "s", 200), *(Sample("b", "s", 10_000) for _ in range(15))]
    for _ in range(200):
        assert len(queue.tick()) == 16
    queue.samples += [Sample("a", "t", 10_000) for _ in range(16)]
    waited = 0
    while not any(sample.client == "b" for sample in queue.tick()):
        waited += 1
    assert waited <= 3


def test_whoever_comes_back_at_once_has_not_lost_its_debt():
    queue = Queue(1)
    queue.samples = [Sample("steady", "s", 10_000)]
    steady = queue.samples[0]
    made = 0
    for _ in range(100):
        if not any(sample.client == "again" for sample in queue.samples):
            queue.samples.append(Sample("again", "t", 1, 3))
        made += sum(sample.work for sample in queue.tick() if sample.client == "again")
    assert made <= steady.made * steady.work + 2 * 3


def test_within_a_client_the_oldest_go_first_and_newcomers_fill_the_batch():
    first, second, third = Sample("x", "a", 2), Sample("x", "a", 9), Sample("x", "a", 9)
    queue = Queue(2)
    queue.samples = [first, second]
    assert queue.tick() == [first, second]
    queue.samples.append(third)
    assert queue.tick() == [first, second]
    assert queue.tick() == [second, third]


def test_of_larger_images_fewer_make_a_batch_and_one_always_does():
    queue = Queue(8, max_pixels=8)
    queue.samples = [Sample("x", "large", 1, 4) for _ in range(3)]
    assert len(queue.tick()) == 2
    queue.samples = [Sample("x", "huge", 1, 100) for _ in range(3)]
    assert len(queue.tick()) == 1
