"""What trainer and teacher servers check of each other before the first round."""

import json
import shutil
from concurrent.futures import Future

import pytest
import torch
from opd_core.errors import RefusedError
from opd_core.models.adapter_file import read_teacher
from opd_core.models.fingerprint import fingerprint
from opd_core.scales import Scales
from opd_core.teachers.agreement import check_identity, self_test

from tests.teacher.conftest import TEACHERS


def test_identity_and_self_test_of_the_right_service(client, rows, tiny_base, tiny_world):
    teachers = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    check_identity(client, base=tiny_base, teachers=teachers, max_sequence_length=10)
    before = client.stats.requests
    assert 0 <= tried(client, rows, TEACHERS) <= 1
    assert client.stats.requests - before == 2 * len(TEACHERS) + 9 + 1  # which registers the two prompts


def tried(client, rows, teachers, student=lambda latents, _: torch.zeros_like(latents)):
    """The self-test of teachers on one server, by default of a student as far from them as zero is."""
    scales = dict.fromkeys(teachers, Scales(4.5))
    prompts = rows.conditioning[0], rows.negative
    return self_test(client, scales, [teachers[0]], (16, 8, 8), *prompts, student, rounding=1e-3)


def test_another_base_teacher_or_length_is_refused_with_every_difference(client, tiny_base, tiny_world, tmp_path):
    swapped = {
        "ocr": read_teacher(tiny_world / "teachers" / "geneval"),
        "unheard-of": read_teacher(tiny_world / "teachers" / "ocr"),
    }
    shutil.copytree(tiny_base, tmp_path / "base")
    config = tmp_path / "base" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 16', '"latent_channels": 16, "other": 1'))
    with pytest.raises(RefusedError) as refusal:
        check_identity(client, base=tmp_path / "base", teachers=swapped, max_sequence_length=77)
    message = str(refusal.value)
    for words in (
        "base: the server has",
        "maxSequenceLength: the server has 10, the spec 77",
        "teacher ocr",
        "unheard-of",
    ):
        assert words in message
    assert client.describe().base == fingerprint(tiny_base)


def test_another_schedule_is_another_base(client, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "shift": config["shift"] + 1}))
    with pytest.raises(RefusedError, match="base: the server has"):
        check_identity(client, base=tmp_path / "base", teachers={}, max_sequence_length=10)


class Wandering:
    """Its answers to the teachers `who` are another by 0.001 each time, once all are asked at once."""

    def __init__(self, *who):
        self.who, self.asked, self.events = who, [], []

    def submit(self, teacher, latents, *_):
        first = teacher not in self.asked
        self.asked.append(teacher)
        self.events.append(len(latents))
        answer = Answer(self.events)
        answer.set_result(latents + (0.0 if first or teacher not in self.who else 0.001 * self.asked.count(teacher)))
        return answer


class Answer(Future):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def result(self, timeout=None):
        self.events.append("answer")
        return super().result(timeout)


@pytest.mark.parametrize("count", [1, 50])
def test_the_self_test_asks_each_teacher_twice_and_one_of_a_server_in_earnest(rows, count):
    """Alone, one after the other, then all at once: 109 requests and 147 rows for 50 teachers, 600 and 2600 before."""
    client, names = Wandering(), [f"t{i}" for i in range(count)]
    tried(client, rows, names)
    assert client.events == [*[1, "answer"] * count, *[1] * count, *[1] * 7, 8, 32, *["answer"] * (count + 9)]
    assert {name: client.asked.count(name) for name in names} == {**dict.fromkeys(names, 2), "t0": 11}


def test_answers_that_wander_fail_the_self_test(rows):
    def ask(shift):
        return tried(Wandering("ocr"), rows, ["ocr"], lambda latents, _: latents + shift)

    assert ask(0.5) < 1  # far from its teacher, what wanders by 0.011 is little
    with pytest.raises(RefusedError, match=r"by 0\.011 .* distance from the student is 0\.05, and 0\.005 is accepted"):
        ask(0.05)
    with pytest.raises(RefusedError, match="distance from the student is 0, and 0.00098 is accepted"):
        ask(0.0)


def test_a_teacher_whose_answer_depends_on_the_others_fails_whoever_it_is(rows):
    with pytest.raises(RefusedError, match=r"teacher t7 answers one state differently by 0\.002"):
        tried(Wandering("t7"), rows, [f"t{i}" for i in range(10)], lambda latents, _: latents)
