"""Many LoRAs on one base: a batch of all of them is each one's own answer, and a bounded number is in memory."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.adapters import load_adapter, use_adapter
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.outline import linear_layers
from opd_core.models.pipeline import load_model
from opd_core.scales import Scales
from opd_core.teachers.contract import BASE
from opd_core.teachers.engine import Engine, Query

from tests.loras import as_kohya, random_lora
from tests.teacher.conftest import scales_of

# What a file may differ in: rank, scale, kinds of layers, ranks and scales by layer, the root of the rank.
KINDS = (
    {"rank": 4, "alpha": 8},
    {"rank": 8, "alpha": 2},
    {"rank": 3, "alpha": 7, "rslora": True},
    {"rank": 2, "alpha": 4, "only": "attn"},
    {"rank": 4, "alpha": 4, "other": ("ff.", 9, 5.0)},
)
NAMES = tuple(f"teacher-{i}" for i in range(8))


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    linear = linear_layers(tiny_base)
    folder = tmp_path_factory.mktemp("loras")
    for i, name in enumerate(NAMES):
        kind = KINDS[i % len(KINDS)]
        mark, rank, alpha = kind.get("other", ("nothing", 0, 0))
        layers = [layer for layer in linear if "blocks." in layer and kind.get("only", "") in layer]
        ranks = {layer: rank if mark in layer else kind["rank"] for layer in layers}
        alphas = {layer: alpha if mark in layer else kind["alpha"] for layer in layers}
        file = random_lora(folder / name, linear, ranks, alphas, seed=i, rslora=kind.get("rslora", False))
        if i == 5:
            as_kohya(file, kind["alpha"])
    return folder


def make_engine(tiny_base, files, room=None, dtype=torch.float32):
    model = load_model(tiny_base, parts={"transformer"}, dtype=dtype)
    adapters = {name: read_teacher(files / name) for name in NAMES}
    prints = {name: adapter_fingerprint(adapter) for name, adapter in adapters.items()}
    return Engine(model, NAMES, AdapterPool(model.transformer, adapters, prints, room))


@pytest.fixture(scope="module")
def engine(tiny_base, files):
    return make_engine(tiny_base, files)


@pytest.fixture
def few(tiny_base, files, engine):
    """An engine with room for three of its eight LoRAs."""
    bounded = make_engine(tiny_base, files, room=engine.adapters.nbytes * 7 // 8)
    assert bounded.adapters.places == 3
    return bounded


def query(rows, teachers, guidance=None):
    count = len(teachers)
    scales = rows.scales[:count] if guidance is None else scales_of(torch.full((count,), guidance))
    return Query(
        torch.tensor(teachers), rows.latents[:count], rows.sigmas[:count], scales, rows.conditioning[:count],
        [rows.negative] * count,
    )  # fmt: skip


MIXED = [BASE if i % 9 == 8 else i % 9 for i in range(32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_is_what_peft_makes_of_each_row(tiny_base, files, rows, dtype):
    """Guided and unguided rows, of every kind of file and of the base."""
    together = make_engine(tiny_base, files, dtype=dtype).answer(query(rows, MIXED))
    peft = load_model(tiny_base, parts={"transformer"}, dtype=dtype)
    for name in NAMES:
        load_adapter(peft.transformer, read_teacher(files / name), name)
    for i, number in enumerate(MIXED):
        use_adapter(peft.transformer, None if number == BASE else NAMES[number])
        prompts = peft.prompts([rows.conditioning[i]], [rows.negative], [Scales(*rows.scales[i].tolist())])
        with torch.no_grad():
            alone = peft.velocity(rows.latents[i : i + 1], rows.sigmas[i : i + 1], prompts)[0]
        if dtype == torch.float32:
            torch.testing.assert_close(together[i], alone, rtol=2e-4, atol=2e-4)
        else:
            assert rms(together[i] - alone) < 0.02 * rms(alone)


def rms(tensor):
    return float(tensor.square().mean().sqrt())


def test_a_rows_answer_does_not_depend_on_its_company(engine, rows):
    together = engine.answer(query(rows, MIXED))
    for teachers in ([MIXED[0]] * 32, [MIXED[0], *[BASE] * 31], MIXED[:5], MIXED[:1]):
        torch.testing.assert_close(engine.answer(query(rows, teachers))[0], together[0], rtol=1e-5, atol=1e-5)


def test_rows_of_all_teachers_are_one_pass(engine, rows, monkeypatch):
    asked = []
    forward = type(engine.model).forward
    monkeypatch.setattr(
        type(engine.model), "forward", lambda self, x, *rest: asked.append(len(x)) or forward(self, x, *rest)
    )
    engine.answer(query(rows, MIXED, guidance=4.5))
    assert asked == [64]


def test_those_that_find_no_place_are_loaded_on_demand(engine, few, rows):
    """Nothing else changes: neither the answer of a batch of more than fit, nor of one that asks for them in turn."""
    torch.testing.assert_close(few.answer(query(rows, MIXED)), engine.answer(query(rows, MIXED)), rtol=1e-4, atol=1e-4)
    assert few.adapters.nbytes < engine.adapters.nbytes * 7 // 8
    for number in (0, 5, 7, 2, 0):
        torch.testing.assert_close(
            few.answer(query(rows, [number] * 2)), engine.answer(query(rows, [number] * 2)), rtol=1e-4, atol=1e-4
        )
    assert engine.adapters.stats.loads == len(NAMES)
    assert engine.adapters.stats.drops == 0


def test_the_least_recently_used_leaves(few, rows):
    pool = few.adapters
    assert (pool.resident, pool.stats.loads, pool.stats.drops) == ([*NAMES[:3]], 3, 0)
    few.answer(query(rows, [0]))
    few.answer(query(rows, [3]))
    assert pool.resident == [NAMES[2], NAMES[0], NAMES[3]]
    few.answer(query(rows, [0, 3, 2, 0]))
    few.answer(query(rows, [BASE]))
    assert (pool.stats.loads, pool.stats.drops) == (4, 1)


def test_those_that_ask_at_once_for_one_that_is_not_there_load_it_once(few, rows):
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: few.answer(query(rows, [6])), range(8)))
    assert few.adapters.stats.loads == 4
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)


@pytest.mark.parametrize("fate", ["vanished", "changed", "damaged"])
def test_a_file_that_is_another_one_now_is_refused_alone(tiny_base, files, engine, rows, tmp_path, fate):
    own = tmp_path / "loras"
    shutil.copytree(files, own)
    few = make_engine(tiny_base, own, room=engine.adapters.nbytes * 7 // 8)
    file = own / NAMES[6] / "pytorch_lora_weights.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if fate == "changed":
        shutil.copy(own / NAMES[1] / file.name, file)
    elif fate == "damaged":
        file.write_bytes(whole[:-100])
    words = "has changed since the start" if fate == "changed" else "not a readable safetensors file"
    with pytest.raises(InvalidError, match=rf"teacher {NAMES[6]} cannot be loaded: .*{words}.*put the file back"):
        few.answer(query(rows, [6]))
    assert torch.isfinite(few.answer(query(rows, [0, 1, 2, 5]))).all()
    file.write_bytes(whole)
    assert torch.isfinite(few.answer(query(rows, [6]))).all()


def test_memory_is_one_base_and_the_loras(engine, files):
    """No padding to the largest rank, and none for layers that a LoRA leaves alone."""
    adapters = [read_teacher(files / name) for name in NAMES]
    numbers = sum(rows * columns for adapter in adapters for rows, columns in adapter.shapes.values())
    assert engine.adapters.nbytes < 1.1 * 4 * numbers
