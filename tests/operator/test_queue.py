"""The work queue: each key at most once in the queue and once at work, and none is ever lost."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from opd_operator.queue import WorkQueue, work

KEYS = st.sampled_from("abcd")
LOOP = asyncio.new_event_loop()  # a queue lives in one loop, and these tests look at it between its steps


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    yield
    LOOP.close()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(queue: WorkQueue[str]) -> str | None:
    """The key that a worker gets now; None if it would have to wait."""

    async def get() -> str:
        return (await queue.get())[0]

    async def soon() -> str | None:
        task = asyncio.ensure_future(get())
        for _ in range(3):
            await asyncio.sleep(0)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None

    return LOOP.run_until_complete(soon())


class AnyOrder(RuleBasedStateMachine):
    """Whatever is asked of the queue in whatever order, against a model of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue: WorkQueue[str] = WorkQueue(self.clock)
        self.owed: set[str] = set()  # asked for, and not given out since
        self.later: dict[str, float] = {}  # the earliest time asked for
        self.active: set[str] = set()

    @rule(key=KEYS)
    def add(self, key: str) -> None:
        self.queue.add(key)
        self.owed.add(key)

    @rule(key=KEYS, seconds=st.integers(0, 20))
    def add_after(self, key: str, seconds: int) -> None:
        self.queue.add_after(key, seconds)
        self.later[key] = min(self.later.get(key, float("inf")), self.clock.now + seconds)

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def get(self) -> None:
        due = {key for key, time in self.later.items() if time <= self.clock.now}
        self.owed |= due
        for key in due:
            del self.later[key]
        key = taken(self.queue)
        free = self.owed - self.active
        if key is None:
            assert not free, f"{free} are waiting and nobody gets them"
            return
        assert key in free, f"{key} was not asked for, or is at work already"
        self.owed.discard(key)
        self.active.add(key)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.active)))
        self.active.discard(key)
        self.queue.done(key)

    @invariant()
    def holds_no_key_twice(self) -> None:
        assert len(self.queue) <= len({*"abcd"} - self.active)

    def teardown(self) -> None:
        """Once the workers have finished and all times have come, everything owed is given out, once."""
        for key in sorted(self.active):
            self.queue.done(key)
        self.clock.now += 1000
        left = []
        while (key := taken(self.queue)) is not None:
            left.append(key)
        assert sorted(left) == sorted(self.owed | set(self.later))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_key_added_many_times_is_given_out_once() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock())
    for _ in range(5):
        queue.add("a")
    assert (taken(queue), taken(queue)) == ("a", None)
    assert queue.adds == 5


def test_a_key_added_while_it_is_at_work_comes_again_afterwards_once() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock())
    queue.add("a")
    assert taken(queue) == "a"
    queue.add("a")
    queue.add("a")
    assert taken(queue) is None
    queue.done("a")
    assert taken(queue) == "a"
    queue.done("a")
    assert taken(queue) is None


def test_of_two_times_the_earlier_one_counts() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add_after("a", 10)
    queue.add_after("a", 3)
    queue.add_after("a", 20)
    assert taken(queue) is None
    clock.now += 3
    assert taken(queue) == "a"
    queue.done("a")
    clock.now += 100
    assert taken(queue) is None


def test_keys_come_in_the_order_in_which_they_were_added_and_say_how_long_they_waited() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("b")
    clock.now += 4
    queue.add("a")
    assert queue.oldest_seconds == 4
    assert asyncio.run(queue.get()) == ("b", 4)
    assert asyncio.run(queue.get()) == ("a", 0)
    assert queue.oldest_seconds == 0


def test_the_pause_doubles_with_every_failure_up_to_a_minute_and_starts_anew_after_a_success() -> None:
    queue: WorkQueue[str] = WorkQueue(Clock())
    pauses = [queue.retry("a") for _ in range(40)]
    for count, pause in enumerate(pauses):
        expected = min(0.5 * 2**count, 60)
        assert 0.8 * expected <= pause <= 1.2 * expected
    assert queue.retry("b") <= 0.6
    queue.forget("a")
    assert queue.retry("a") <= 0.6


def test_a_worker_that_waits_is_woken_by_a_key_and_by_a_time_that_comes() -> None:
    async def scenario() -> list[str]:
        queue: WorkQueue[str] = WorkQueue()
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0.01)
        queue.add("a")
        first = await asyncio.wait_for(waiting, 1)
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0.01)
        queue.add_after("c", 30)
        queue.add_after("b", 0.02)  # earlier than what it sleeps for
        second = await asyncio.wait_for(waiting, 1)
        return [first[0], second[0]]

    assert asyncio.run(scenario()) == ["a", "b"]


def running(
    handle: Callable[[WorkQueue[str], str], Awaitable[None]], keys: list[str], workers: int = 4
) -> WorkQueue[str]:
    """Some workers on `keys`, until nothing is left."""

    async def scenario() -> WorkQueue[str]:
        queue: WorkQueue[str] = WorkQueue()
        active: set[str] = set()

        async def one(key: str, _: float) -> None:
            active.add(key)
            try:
                await handle(queue, key)
            finally:
                active.discard(key)

        tasks = [asyncio.create_task(work(queue, one)) for _ in range(workers)]
        for key in keys:
            queue.add(key)
        await asyncio.sleep(0)
        while active or len(queue):
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return queue

    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_workers_share_the_keys_but_never_one_key() -> None:
    at_work: set[str] = set()
    together, times = 0, Counter[str]()

    async def handle(queue: WorkQueue[str], key: str) -> None:
        nonlocal together
        assert key not in at_work
        at_work.add(key)
        together = max(together, len(at_work))
        if times[key] < 3:
            queue.add(key)  # its own write comes back as an event
        times[key] += 1
        await asyncio.sleep(0.001)
        at_work.discard(key)

    running(handle, [f"key-{number}" for number in range(20)])
    assert together == 4
    assert set(times.values()) == {4}


def test_a_worker_that_is_cancelled_does_not_hold_its_key() -> None:
    async def scenario() -> str:
        queue: WorkQueue[str] = WorkQueue()

        async def handle(_: str, __: float) -> None:
            await asyncio.sleep(60)

        task = asyncio.create_task(work(queue, handle))
        queue.add("a")
        await asyncio.sleep(0.01)
        queue.add("a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await asyncio.wait_for(queue.get(), 1))[0]

    assert asyncio.run(scenario()) == "a"


def test_what_is_longest_at_work_is_known_however_long_the_queue_is() -> None:
    clock = Clock()
    queue = WorkQueue[str](clock)
    for key in "abc":
        queue.add(key)
    clock.now += 1000
    assert queue.busy_seconds == 0
    assert (taken(queue), queue.busy_seconds) == ("a", 0)
    clock.now += 7
    assert taken(queue) == "b"
    clock.now += 3
    assert queue.busy_seconds == 10
    queue.done("a")
    assert queue.busy_seconds == 3
    queue.done("b")
    assert queue.busy_seconds == 0
