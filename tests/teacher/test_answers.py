"""What a teacher answers: the right numbers, whatever else is in the batch."""

import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as triton
from opd_core.conditioning import Conditioning, stack
from opd_core.diffusion.guidance import combined
from opd_core.errors import InvalidError, OutOfMemoryError, RefusedError
from opd_core.families.guidance import CLASSIFIER_FREE
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.adapters import load_adapter, use_adapter
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.pipeline import Model, load_model
from opd_core.precision import TORCH_DTYPES
from opd_core.scales import Scales
from opd_core.teachers import contract
from opd_core.teachers.engine import ConditioningCache, Engine, Query, UnknownKeyError
from opd_core.teachers.grpc_client import connect
from opd_core.teachers.local import LocalTeachers
from opd_core.teachers.wire import register_inputs
from opd_core.uris import cache_dir
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.teacher.conftest import QUICK, TEACHERS, scales_of


@pytest.fixture(scope="module")
def local(tiny_base, tiny_world):
    adapters = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    return LocalTeachers(tiny_base, adapters, precision="FP32", max_sequence_length=10)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_triton_answers_as_the_same_teacher_in_process(client, local, rows, teacher):
    served, here = rows.ask(client, teacher).result(), rows.ask(local, teacher).result()
    assert served.dtype == torch.float32
    torch.testing.assert_close(served, here.half().float(), rtol=2e-3, atol=2e-3)  # one rounding to float16


def test_the_base_answers_in_the_teachers_batches(client, local, rows, tiny_base):
    """Among concurrent questions to all teachers, as an extrapolation asks."""
    several = [(rows.ask(client, teacher), rows.ask(client, teacher, base=True)) for teacher in TEACHERS]
    model = load_model(tiny_base, parts={"transformer"})
    prompts = model.prompts(
        rows.conditioning, [rows.negative] * len(rows.latents), [Scales(*each) for each in rows.scales.tolist()]
    )
    with torch.no_grad():
        expected = model.velocity(rows.latents, rows.sigmas, prompts)
    for teacher, base in several:
        torch.testing.assert_close(base.result(), expected.half().float(), rtol=2e-3, atol=2e-3)
        assert (teacher.result() - base.result()).abs().max() > 0.05
    torch.testing.assert_close(rows.ask(local, "ocr", base=True).result(), expected)


def test_both_branches_come_in_the_teachers_batches(client, local, rows, tiny_base):
    """Of teacher and base, among concurrent questions for velocities, which guidance makes of them."""
    rows = replace(rows, scales=scales_of(torch.linspace(1.5, 6.0, 32)))
    asked = [(rows.ask(client, name, branches=True), rows.ask(client, name)) for name in TEACHERS]
    base = rows.ask(client, "ocr", base=True, branches=True).result()
    for name, (branches, velocity) in zip(TEACHERS, asked, strict=True):
        both, here = branches.result(), rows.ask(local, name, branches=True).result()
        assert (both.shape, both.dtype) == ((32, 2, 16, 8, 8), torch.float32)
        torch.testing.assert_close(both, here.half().float(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            combined(CLASSIFIER_FREE, both, rows.scales), velocity.result(), rtol=0.02, atol=0.02
        )
        assert torch.equal(combined(CLASSIFIER_FREE, here, rows.scales), rows.ask(local, name).result())
    model = load_model(tiny_base, parts={"transformer"})
    alone = [model.prompts(told, told, [Scales(1.0)] * 32) for told in (rows.conditioning, [rows.negative] * 32)]
    with torch.no_grad():
        expected = torch.stack([model.velocity(rows.latents, rows.sigmas, prompts) for prompts in alone], 1)
    torch.testing.assert_close(base, expected.half().float(), rtol=2e-3, atol=2e-3)
    assert (both - base).abs().amax((0, 2, 3, 4)).min() > 0.05


def test_one_request_may_ask_for_branches_and_velocity(client, server, rows):
    rows = replace(rows, scales=scales_of(torch.full((32,), 4.5)))[:4]
    both = rows.ask(client, "ocr", branches=True).result()  # and the prompts are registered
    names = (contract.VELOCITY, contract.BRANCHES)
    with triton.InferenceServerClient(server.address) as raw:
        wanted = [triton.InferRequestedOutput(name) for name in names]
        answer = raw.infer(contract.MODEL, raw_inputs(rows), outputs=wanted)
    velocity, branches = (torch.from_numpy(answer.as_numpy(name).astype(np.float32)) for name in names)
    assert torch.equal(branches, both)
    torch.testing.assert_close(combined(CLASSIFIER_FREE, branches, rows.scales), velocity, rtol=0.02, atol=0.02)


def test_branches_of_a_row_without_guidance_are_refused(client, local, rows):
    with pytest.raises(RefusedError, match="guidance 1 has one"):
        rows.ask(client, "ocr", branches=True).result()
    with pytest.raises(InvalidError, match="guidance 1 has one"):
        rows.ask(local, "ocr", branches=True).result()


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
        "ocr", many, rows.sigmas.repeat(3), rows.scales.repeat(3, 1), rows.conditioning * 3, rows.negative
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
        contract.GUIDANCE: ("FP32", rows.scales[:, :1].numpy()),
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
        (contract.TEACHER, np.full((4, 1), -2, np.int32), "no teacher has number -2"),
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


def test_nothing_on_the_command_line_opens_the_servers_administration(server):
    """Everybody on the machine can read it."""
    line = psutil.Process(server.stub().ppid()).cmdline()
    (option,) = [argument for argument in line if argument.startswith("--http-restricted-api=")]
    name, _, value = option.rpartition(":")[2].partition("=")
    assert "--model-control-mode=none" in line
    for sent in (value, f"x{value} x", value.strip(), f"{value}{value}"):
        answer = raw_http(server.http, f"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n{name}: {sent}\r\n")
        assert not answer.startswith("HTTP/1.1 2"), answer
    assert raw_http(server.http, "GET /v2/health/live HTTP/1.1\r\nHost: x\r\n").startswith("HTTP/1.1 200")


def raw_http(address, head):
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(4096).decode()


def test_a_key_is_the_digest_of_what_is_registered_under_it(server, client, rows):
    """Nobody can put another prompt in the place of one that others use."""
    rows[0:1].ask(client, "ocr").result()
    raw = triton.InferenceServerClient(server.address)
    forged = register_inputs(client.describe(), [altered(rows.conditioning[0])])
    forged[0] = raw_input(contract.KEY, "UINT8", np.frombuffer(rows.conditioning[0].key, np.uint8)[None])
    inputs = [raw_input(t.name(), t.datatype(), content(t)) for t in forged[1:]]
    with pytest.raises(triton.InferenceServerException, match="is not the digest of its tensors"):
        raw.infer(contract.MODEL, [forged[0], *inputs], outputs=[triton.InferRequestedOutput(contract.REGISTERED)])
    raw.close()


def altered(conditioning):
    return Conditioning({**conditioning.tensors, "embeds": conditioning.tensors["embeds"] + 1})


def content(tensor):
    """What an input of the asynchronous client holds."""
    return np.frombuffer(tensor._get_content(), np.uint8).reshape(tensor.shape())


def test_ranks_that_ask_at_once_get_what_each_gets_alone(server, rows):
    """Clients of their own, as in several processes, each with its own prompts and teachers."""
    clients = [connect([server.address], QUICK) for _ in range(4)]
    parts = [rows[i : i + 8] for i in range(0, 32, 8)]
    asked = [
        [(part.ask(c, teacher), teacher, part) for teacher in TEACHERS for _ in range(2)]
        for c, part in zip(clients, parts, strict=True)
    ]
    for future, teacher, part in (entry for of_client in asked for entry in of_client):
        torch.testing.assert_close(future.result(), part.ask(clients[0], teacher).result(), rtol=0, atol=0)
    for c in clients:
        c.close()


# ---------------------------------------------------------------- half precision, through a real Triton


@pytest.mark.parametrize("precision", ["BF16", "FP16"])
def test_half_precision_on_the_wire_is_the_same_teacher(
    make_server, rows, tiny_base, tiny_world, tmp_path, monkeypatch, precision
):
    """The default precision. The server's folders have names that a shell would run, and its clients a proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cache = tmp_path / "my (cache)"
    cache.symlink_to(cache_dir())
    monkeypatch.setenv("OPD_CACHE", str(cache))
    change = {"precision: FP32": f"precision: {precision}"}
    server = make_server(change=change, name="ein Lauf ü (1) $(touch run-by-a-shell)").start()
    adapters = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    here = LocalTeachers(tiny_base, adapters, precision=precision, max_sequence_length=10)
    exact = LocalTeachers(tiny_base, adapters, precision="FP32", max_sequence_length=10)
    client = connect([server.address], QUICK)
    for teacher in TEACHERS:
        served, local, full = (rows.ask(c, teacher).result() for c in (client, here, exact))
        step = float(torch.finfo(torch.float16).eps) * float(local.abs().max())
        torch.testing.assert_close(served, local, rtol=0, atol=step)  # to one rounding
        assert 0 < rms(served - full) < 0.05 * rms(full)
    alone = torch.cat([rows[i : i + 1].ask(client, "ocr").result() for i in (0, 5, 31)])
    assert rms(alone - rows.ask(client, "ocr").result()[[0, 5, 31]]) < 0.01 * rms(alone)
    raw = triton.InferenceServerClient(server.address, channel_args=[("grpc.enable_http_proxy", 0)])
    bits = rows.latents.to(TORCH_DTYPES[precision])
    wire = bits.view(torch.int16).numpy() if precision == "BF16" else bits.numpy()
    keys = [c.cast(TORCH_DTYPES[precision]).key for c in (*rows.conditioning, rows.negative)]
    arrays = np.stack([np.frombuffer(key, np.uint8) for key in keys])
    mean = [
        raw_input(contract.LATENTS, contract.WIRE_TYPES[precision], wire),
        *raw_inputs(rows, latents=None, key=arrays[:-1], negative_key=arrays[-1:].repeat(32, 0)),
        fp32(contract.MEAN_A, torch.ones(32)), fp32(contract.MEAN_B, torch.ones(32)),
    ]  # fmt: skip
    with pytest.raises(triton.InferenceServerException, match="a mean needs teacherServing.precision FP32"):
        raw.infer(contract.MODEL, mean, outputs=[triton.InferRequestedOutput(contract.MEAN)])
    raw.close()
    client.close()
    assert not list(server.folder.parent.rglob("run-by-a-shell"))
    assert not Path("run-by-a-shell").exists()


def rms(tensor):
    return float(tensor.square().mean().sqrt())


# ---------------------------------------------------------------- the engine


@pytest.fixture
def engine(tiny_base, tiny_world):
    model = load_model(tiny_base, parts={"transformer"})
    adapters = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    prints = {name: adapter_fingerprint(adapter) for name, adapter in adapters.items()}
    return Engine(model, TEACHERS, AdapterPool(model.transformer, adapters, prints))


def query(rows, teachers, guidance=None):
    scales = rows.scales if guidance is None else scales_of(torch.full_like(rows.sigmas, guidance))
    negative = [rows.negative] * len(rows.latents)
    return Query(torch.tensor(teachers), rows.latents, rows.sigmas, scales, rows.conditioning, negative)


def room_for(monkeypatch, most):
    """Forward passes of more rows find no memory. Returns how many rows each pass was asked for."""
    asked, forward = [], Model.forward

    def limited(self, latents, *rest):
        asked.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, latents, *rest)

    monkeypatch.setattr(Model, "forward", limited)
    return asked


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(engine, rows, monkeypatch):
    mixed = query(rows, [i % 3 for i in range(32)], guidance=4.5)
    expected = engine.answer(mixed)
    asked = room_for(monkeypatch, most=6)
    torch.testing.assert_close(engine.answer(mixed), expected, rtol=1e-4, atol=1e-4)
    assert max(asked) == 64  # all rows of all teachers, twice for guidance
    asked.clear()
    engine.answer(mixed)
    assert max(asked) <= 6
    assert len(engine.answer(query(rows, [0] * 32, guidance=1.0))) == 32


def test_a_row_that_does_not_fit_alone_is_said_to_be_so(engine, rows, monkeypatch):
    room_for(monkeypatch, most=1)
    with pytest.raises(
        OutOfMemoryError, match=r"no memory for one row of latents \[16, 8, 8\]; give the teacher server"
    ):
        engine.answer(query(rows, [0] * 32, guidance=4.5))
    assert engine.answer(query(rows, [0] * 32, guidance=1.0)).shape == (32, 16, 8, 8)


def test_other_errors_of_a_forward_pass_stay_what_they_are(engine, rows, monkeypatch):
    monkeypatch.setattr(Model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.answer(query(rows, [0] * 32))


def test_guidance_of_at_most_one_is_off_as_in_diffusers(engine, rows, monkeypatch):
    off = engine.answer(query(rows, [1] * 32, guidance=1.0))
    asked = room_for(monkeypatch, most=1000)
    for guidance in (0.0, 0.5):
        torch.testing.assert_close(engine.answer(query(rows, [1] * 32, guidance=guidance)), off, rtol=0, atol=0)
    assert asked == [32, 32]


def test_a_gpu_computes_few_numbers_of_rows(engine, monkeypatch):
    shape = torch.Size((16, 8, 8))
    assert [engine._bucket(shape, n) for n in (1, 9, 64)] == [1, 9, 64]
    gpu = Engine(SimpleNamespace(device=torch.device("cuda")), TEACHERS)
    assert sorted({gpu._bucket(shape, n) for n in range(1, 65)}) == [8, 16, 32, 64]
    assert all(gpu._bucket(shape, n) >= n for n in range(1, 65))


def test_switching_to_the_adapter_in_use_looks_at_no_layer(tiny_base, tiny_world, monkeypatch):
    transformer = load_model(tiny_base, parts={"transformer"}).transformer
    for name in TEACHERS:
        load_adapter(transformer, read_teacher(tiny_world / "teachers" / name), name)
    use_adapter(transformer, "ocr")
    monkeypatch.setattr(type(transformer), "modules", lambda _: 1 / 0)
    monkeypatch.setattr(BaseTunerLayer, "set_adapter", lambda *_, **__: 1 / 0)
    use_adapter(transformer, "ocr")
    with pytest.raises(ZeroDivisionError):
        use_adapter(transformer, "geneval")


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
    with pytest.raises(UnknownKeyError, match="1 of 2 keys") as refusal:
        cache.get([a.key, b.key])
    assert contract.missing_keys(str(refusal.value)) == {b.key}


def test_a_prompt_of_all_rows_takes_the_memory_of_one(rows):
    for name, tensor in stack([rows.negative] * 8, "cpu", torch.float32).items():
        assert (tensor.shape[0], tensor.stride(0)) == (8, 0)
        torch.testing.assert_close(tensor[7], rows.negative.tensors[name], rtol=0, atol=0)
