"""Who is let in, and whether there is room when those who were refused come again as they were told."""

import asyncio
import dataclasses
from dataclasses import dataclass, field

import openai
import pytest
from opd_serving.endpoint.admission import Room
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import make_service

from tests.endpoint.conftest import running


@dataclass
class Job:
    client: str
    images: int
    work_left: float


@dataclass
class Line:
    """A server that advances `batch` images at a time, oldest first, at `rate` work a second; and clients that come
    when they are told to."""

    room: Room
    rate: float
    jobs: list[Job] = field(default_factory=list)
    now: float = 0.0

    def ask(self, client: str, images: int, work: float) -> int | None:
        seconds = self.room.ask(client, images, work, self.jobs, self.rate, self.now)
        if seconds is None:
            self.jobs.append(Job(client, images, work))
        return seconds

    def run(self, seconds: float) -> None:
        self.now += seconds
        left = seconds * self.rate
        while self.jobs and left > 0:
            batch, places = [], self.room.batch
            for job in self.jobs:
                if places > 0:
                    batch.append(job)
                    places -= job.images
            part = min(left / len(batch), min(job.work_left for job in batch))
            left -= part * len(batch)
            for job in batch:
                job.work_left -= part
            self.jobs = [job for job in self.jobs if job.work_left > 1e-9]


@pytest.mark.parametrize(("images", "clients"), [(1, 120), (1, 200), (2, 60), (3, 50)])
def test_nobody_who_waits_as_told_is_refused_twice(images, clients):
    """Stock OpenAI clients give up after two retries; 40 of 120 did, because all were told the same second."""
    line = Line(Room(80, 1e9, 16), rate=16.0)
    asked, tries = dict.fromkeys(range(clients), 0.0), dict.fromkeys(range(clients), 0)
    for _ in range(200):
        for number, due in list(asked.items()):
            if due <= line.now:
                tries[number] += 1
                seconds = line.ask("all", images, 4.0 * images)
                if seconds is None:
                    del asked[number]
                else:
                    asked[number] = line.now + seconds
        line.run(1.0)
    assert not asked
    assert max(tries.values()) <= 2


@pytest.mark.parametrize(("images", "clients", "more"), [(1, 120, 1), (1, 200, 1), (2, 120, 2), (3, 60, 4)])
def test_newcomers_do_not_take_the_places_that_others_were_told_of(images, clients, more):
    """Behind a burst nearly as much comes as can be made: a request every `more` quarters of a second. OpenAI's clients
    ask three times."""
    line = Line(Room(80, 1e9, 16), rate=16.0)
    asked, tries = dict.fromkeys(range(clients), 0.0), dict.fromkeys(range(clients), 0)
    for quarter in range(1000):
        if quarter < 240 and quarter % more == 0:
            asked[len(tries)], tries[len(tries)] = line.now, 0
        for number, _ in sorted((item for item in asked.items() if item[1] <= line.now), key=lambda item: item[1]):
            tries[number] += 1
            seconds = line.ask("all", images, 4.0 * images)
            asked[number] = line.now + (seconds or 0)
            if seconds is None:
                del asked[number]
        line.run(0.25)
    assert not asked
    assert max(tries.values()) <= 3


def test_the_first_room_comes_when_the_batch_ends_that_runs():
    """16 images end together: it is not the sixteenth of the time for each."""
    line = Line(Room(80, 1e9, 16), rate=10.0)
    for _ in range(80):
        assert line.ask("a", 1, 10.0) is None
    assert line.ask("a", 1, 10.0) == 18  # 160 work of the first batch at 10 a second, and a tenth more
    assert line.ask("a", 15, 150.0) == 18
    assert line.ask("a", 1, 10.0) == 36  # the places of the first batch are promised


def test_promises_are_forgotten_when_their_time_is_over():
    line = Line(Room(4, 1e9, 4), rate=1.0)
    for _ in range(4):
        line.ask("a", 1, 5.0)
    assert [line.ask("a", 4, 20.0) for _ in range(2)] == [22, 44]
    line.now += 60
    assert line.ask("a", 1, 5.0) == 22


def test_work_counts_besides_images():
    """80 images of 100 steps at four times the size are not what a queue of 80 is meant for."""
    room = Room(80, 100.0, 16)
    assert room.ask("a", 1, 500.0, [], 10.0, 0.0) is None, "one request may go beyond"
    assert room.ask("a", 1, 1.0, [Job("a", 1, 500.0)], 10.0, 0.0) == 44
    assert room.ask("a", 1, 1.0, [Job("a", 1, 99.0)], 10.0, 0.0) is None


def test_one_client_leaves_room_for_others_as_long_as_there_are_any():
    line = Line(Room(80, 1e9, 16), rate=1.0)
    for _ in range(80):
        assert line.ask("greedy", 1, 1.0) is None, "alone, it may have everything"
    assert line.ask("modest", 1, 1.0) is not None
    line.run(32)
    assert line.ask("greedy", 12, 12.0) is None
    assert line.ask("greedy", 1, 1.0) is not None, "60 of 80"
    assert line.ask("modest", 10, 10.0) is None
    line.now += 61
    assert line.ask("greedy", 5, 5.0) is None, "nobody else has asked for a minute"


def test_stock_clients_all_get_their_image(settings):
    """Half again as many at once as fit, with the two retries that OpenAI's client has by default."""
    service = make_service(dataclasses.replace(settings, steps=20, limits=Limits(4, 16)))
    with running(service) as endpoint:

        async def play() -> list[object]:
            client = openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", timeout=300)
            asked = (client.images.generate(prompt="a", extra_body={"seed": seed}) for seed in range(30))
            return await asyncio.gather(*asked, return_exceptions=True)

        answers = asyncio.run(play())
        assert [answer.data[0].seed for answer in answers] == list(range(30))
        assert endpoint.metric('opd_endpoint_rejected_total{reason="queue_full"}') >= 10
