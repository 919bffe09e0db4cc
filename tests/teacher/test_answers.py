"""What a teacher answers: the right numbers, whatever else is in the batch."""

import json
import shutil
from concurrent.futures import Future

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from opd_core.errors import RefusedError
from opd_core.models.adapter_file import read_teacher
from opd_core.models.fingerprint import fingerprint
from opd_core.teachers import contract
from opd_core.teachers.agreement import check_identity, self_test
from opd_core.teachers.engine import ConditioningCache, UnknownKeyError
from opd_core.teachers.local import LocalTeachers

from tests.teacher.conftest import TEACHERS


@pytest.fixture(scope="module")
def local(tiny_base, tiny_world):
    adapters = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    return LocalTeachers(tiny_base, adapters, precision="FP32", max_sequence_length=10)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_triton_answers_as_the_same_teacher_in_process(client, local, rows, teacher):
    served, here = rows.ask(client, teacher).result(), rows.ask(local, teacher).result()
    assert served.dtype == torch.float32
    torch.testing.assert_close(served, here.half().float(), rtol=2e-3, atol=2e-3)  # one rounding to float16


def test_teachers_differ(client, rows):
    answers = [rows.ask(client, teacher).result() for teacher in TEACHERS]
    assert (answers[0] - answers[1]).abs().max() > 0.05
    assert (answers[1] - answers[2]).abs().max() > 0.05


def test_a_row_does_not_depend_on_its_batch(client, rows):
    """Alone, in a batch of 32, and among concurrent requests of all teachers that Triton merges."""
    together = rows.ask(client, "ocr").result()
    crowd = [rows[i : i + 4].ask(client, teacher) for i in range(0, 32, 4) for teacher in TEACHERS]
    alone = torch.cat([rows[i : i + 1].ask(client, "ocr").result() for i in (0, 5, 31)])
    step = float(torch.finfo(torch.float16).eps) * float(together.abs().max())
    torch.testing.assert_close(alone, together[[0, 5, 31]], rtol=0, atol=step)
    of_ocr = torch.cat([future.result() for future in crowd[1 :: len(TEACHERS)]])
    torch.testing.assert_close(of_ocr, together, rtol=0, atol=step)


def test_requests_beyond_the_batch_limit_are_split(client, rows):
    many = rows.latents.repeat(3, 1, 1, 1)
    answer = client.submit(
        "ocr", many, rows.sigmas.repeat(3), rows.guidance.repeat(3), rows.conditioning * 3, rows.negative
    ).result()
    assert len(many) > contract.MAX_ROWS
    assert answer.shape == (96, 16, 8, 8)
    torch.testing.assert_close(answer[:32], answer[64:], rtol=0, atol=5e-3)


def test_prompts_are_registered_once(client, rows):
    rows.ask(client, "ocr").result()
    first = client.stats.registrations
    rows.ask(client, "geneval").result()
    assert (first, client.stats.registrations) == (33, 33)


def test_the_mean_is_a_x_plus_b_v(server, client, rows):
    velocity = rows.ask(client, "ocr").result()
    a, b = torch.linspace(0.5, 1.0, 32), torch.linspace(-0.2, -0.01, 32)
    raw = triton.InferenceServerClient(server.address)
    inputs = [*raw_inputs(rows), fp32(contract.MEAN_A, a), fp32(contract.MEAN_B, b)]
    mean = raw.infer(contract.MODEL, inputs, outputs=[triton.InferRequestedOutput(contract.MEAN)]).as_numpy(
        contract.MEAN
    )
    assert mean.dtype == np.float32
    expected = a.view(-1, 1, 1, 1) * rows.latents + b.view(-1, 1, 1, 1) * velocity
    rounding = float(b.abs().max()) * float(torch.finfo(torch.float16).eps) * float(velocity.abs().max())
    torch.testing.assert_close(torch.from_numpy(mean.copy()), expected, rtol=0, atol=rounding)
    with pytest.raises(triton.InferenceServerException, match="has no a, b"):
        raw.infer(contract.MODEL, raw_inputs(rows), outputs=[triton.InferRequestedOutput(contract.MEAN)])
    raw.close()


# ---------------------------------------------------------------- agreement


def test_identity_and_self_test_of_the_right_service(client, rows, tiny_base, tiny_world):
    teachers = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    check_identity(client, base=tiny_base, teachers=teachers, max_sequence_length=10)
    worst = self_test(client, "ocr", (16, 8, 8), 4.5, rows.conditioning[0], rows.negative, tolerance=1e-3)
    assert 0 <= worst <= 1e-3


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


def test_the_self_test_asks_alone_then_concurrently_and_in_batches(rows):
    events = []

    class Answer(Future):
        def result(self, timeout=None):
            events.append("answer")
            return super().result(timeout)

    class Recording:
        def submit(self, teacher, latents, *_):
            events.append(len(latents))
            answer = Answer()
            answer.set_result(latents)
            return answer

    self_test(Recording(), "ocr", (16, 8, 8), 4.5, rows.conditioning[0], rows.negative, tolerance=1e-3)
    assert events == [1, "answer", *[1] * 8, 1, 8, 32, *["answer"] * 11]


def test_a_service_whose_answers_wander_fails_the_self_test(rows):
    class Wandering:
        calls = 0

        def submit(self, teacher, latents, *_):
            self.calls += 1
            future = Future()
            future.set_result(latents + 0.01 * self.calls)
            return future

    with pytest.raises(RefusedError, match="answers one state differently"):
        self_test(Wandering(), "ocr", (16, 8, 8), 4.5, rows.conditioning[0], rows.negative, tolerance=1e-3)


# ---------------------------------------------------------------- bad queries


def test_unknown_teachers_are_refused_with_the_known_ones(client, rows):
    with pytest.raises(RefusedError, match="holds a teacher pickscore"):
        rows.ask(client, "pickscore").result()


VELOCITY = [triton.InferRequestedOutput(contract.VELOCITY)]


def fp32(name, values):
    return raw_input(name, "FP32", values.float().view(-1, 1).numpy())


def raw_input(name, kind, array):
    tensor = triton.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def raw_inputs(rows, **changed):
    count = len(rows.latents)
    keys = np.stack([np.frombuffer(c.key, np.uint8) for c in rows.conditioning])
    arrays = {
        contract.LATENTS: ("FP32", rows.latents.numpy()),
        contract.SIGMA: ("FP32", rows.sigmas.view(-1, 1).numpy()),
        contract.GUIDANCE: ("FP32", rows.guidance.view(-1, 1).numpy()),
        contract.TEACHER: ("INT32", np.full((count, 1), 1, np.int32)),
        contract.KEY: ("UINT8", keys),
        contract.NEGATIVE_KEY: ("UINT8", np.repeat(np.frombuffer(rows.negative.key, np.uint8)[None], count, 0)),
    }
    for name, array in changed.items():
        arrays[name] = (arrays[name][0], array)
    return [raw_input(name, kind, array) for name, (kind, array) in arrays.items() if array is not None]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (contract.LATENTS, np.full((4, 16, 8, 8), np.nan, np.float32), "NaN or infinite"),
        (contract.LATENTS, np.zeros((4, 3, 8, 8), np.float32), "unexpected shape"),
        (contract.SIGMA, np.zeros((4, 1), np.float32), "sigma must be above 0"),
        (contract.SIGMA, np.full((4, 1), 1.5, np.float32), "at most 1"),
        (contract.GUIDANCE, np.full((4, 1), np.inf, np.float32), "guidance must be finite"),
        (contract.TEACHER, np.full((4, 1), 9, np.int32), "no teacher has number 9; here are geneval, ocr, aesthetic"),
        (contract.KEY, np.zeros((4, 16), np.uint8), "unknown conditioning: 1 of 1 keys"),
        (contract.KEY, None, "the request has no key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_query_is_refused_and_the_next_one_answered(server, client, rows, name, value, message):
    rows[0:4].ask(client, "ocr").result()
    raw = triton.InferenceServerClient(server.address)
    with pytest.raises(triton.InferenceServerException, match=message) as refusal:
        raw.infer(contract.MODEL, raw_inputs(rows[0:4], **{name: value}), outputs=VELOCITY)
    assert ("NOT_FOUND" in str(refusal.value.status())) == ("unknown conditioning" in message)
    answer = raw.infer(contract.MODEL, raw_inputs(rows[0:4]), outputs=VELOCITY)
    assert answer.as_numpy(contract.VELOCITY).shape == (4, 16, 8, 8)
    raw.close()


def test_the_servers_model_control_is_closed(server):
    raw = triton.InferenceServerClient(server.address)
    with pytest.raises(triton.InferenceServerException, match="protocol is restricted"):
        raw.unload_model(contract.MODEL)
    raw.close()


# ---------------------------------------------------------------- the cache


def test_the_cache_forgets_the_least_recently_used(rows):
    size = rows.conditioning[0].nbytes
    cache = ConditioningCache(capacity=3 * size)
    a, b, c, d = rows.conditioning[:4]
    for conditioning in (a, b, c):
        cache.put(conditioning.key, conditioning)
    cache.get([a.key])
    cache.put(d.key, d)
    assert (len(cache), cache.nbytes) == (3, 3 * size)
    assert cache.get([a.key, c.key, d.key]) == [a, c, d]
    with pytest.raises(UnknownKeyError, match="1 of 2 keys"):
        cache.get([a.key, b.key])
