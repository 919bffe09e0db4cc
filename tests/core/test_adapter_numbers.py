"""LoRA files of small numbers: every reader takes exactly the numbers that are there, and nothing computes in eight bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_adapter_file, read_teacher
from opd_core.models.adapter_keys import Format
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.adapters import adapter_state, add_student_adapter, start_adapter
from opd_core.models.export import export
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.inspect import inspect
from opd_core.models.merge import merge
from safetensors.torch import load_file, save_file

from tests.peft_loras import ATTENTION, base, equal, ours, tensors, theirs, velocity

Two = tuple[Path, Path]
EIGHT_BITS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
TYPES = {**EIGHT_BITS, torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@pytest.fixture(params=TYPES, ids=TYPES.values())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture
def two(trained: Callable[..., tuple[Any, Path]], tmp_path: Path, dtype: torch.dtype) -> Two:
    """A LoRA in `dtype`, rounded to it, and one of the same numbers in float32."""
    model, _ = trained()
    small = {f"transformer.{key}": (4 * value).to(dtype) for key, value in tensors(model).items()}
    files = tmp_path / "small" / WEIGHTS, tmp_path / "wide" / WEIGHTS
    for file, state in zip(files, (small, {key: value.float() for key, value in small.items()}), strict=True):
        file.parent.mkdir()
        save_file(state, file)
    return files


def test_a_teacher_answers_as_that_of_the_same_numbers_in_float32(tiny_base: Path, two: Two) -> None:
    small, wide = two
    assert equal(ours(tiny_base, small), ours(tiny_base, wide))
    assert not equal(ours(tiny_base, small), velocity(base(tiny_base)))


def test_teachers_of_a_pool_do_too(tiny_base: Path, two: Two) -> None:
    transformer = base(tiny_base)
    adapters = {file.parent.name: read_teacher(file) for file in two}
    pool = AdapterPool(transformer, adapters, {name: adapter_fingerprint(each) for name, each in adapters.items()})
    answers = []
    for name in adapters:
        with torch.no_grad(), pool.rows([name, name]):
            answers.append(velocity(transformer))
    assert equal(*answers)
    torch.testing.assert_close(answers[0], ours(tiny_base, two[0]), rtol=1e-5, atol=1e-5)


def test_a_student_starts_from_those_numbers(tiny_base: Path, two: Two) -> None:
    transformer = base(tiny_base)
    add_student_adapter(transformer, rank=4, alpha=4, target_modules=ATTENTION, seed=0)
    start_adapter(transformer, read_adapter_file(two[0]))
    started, wide = adapter_state(transformer), load_file(two[1])
    assert all(torch.equal(value, wide[f"transformer.{key}"]) for key, value in started.items())
    assert len(started) == len(wide)


@pytest.mark.parametrize("to", [Format.DIFFUSERS, Format.PEFT, Format.COMFYUI])
def test_an_export_has_those_numbers_and_none_of_eight_bits(
    tiny_base: Path, two: Two, tmp_path: Path, dtype: torch.dtype, to: Format
) -> None:
    """float8 becomes float32, which no program needs a special way for; other types stay."""
    written, wide = (load_file(export(file, tmp_path / file.parent.name / to, to)) for file in two)
    matrices = [key for key in written if ".lora_" in key]
    assert {written[key].dtype for key in matrices} == {torch.float32 if dtype in EIGHT_BITS else dtype}
    assert all(torch.equal(written[key].float(), wide[key]) for key in written)
    if to == Format.DIFFUSERS:
        assert equal(theirs(tiny_base, tmp_path / "small" / to), ours(tiny_base, two[0]))


def test_merged_into_a_base_and_into_a_mean_they_are_those_numbers(tiny_base: Path, two: Two, tmp_path: Path) -> None:
    wholes = [export(file, tmp_path / f"{file.parent.name} whole", Format.MERGED, base=tiny_base) for file in two]
    small, wide = (load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors") for whole in wholes)
    assert all(torch.equal(value, wide[key]) for key, value in small.items())
    for file in two:
        merge([read_adapter_file(file)] * 2, tmp_path / f"{file.parent.name} mean")
    small, wide = (load_file(tmp_path / f"{file.parent.name} mean" / WEIGHTS) for file in two)
    assert all(torch.equal(value, wide[key]) for key, value in small.items())


def test_a_report_names_the_type(tiny_base: Path, two: Two, dtype: torch.dtype) -> None:
    report = inspect(two[0], base=tiny_base)
    assert (report.facts["tensors"], report.refusal) == (TYPES[dtype], None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float8_e4m3fn], ids=str)
def test_an_alpha_tensor_is_of_any_type_of_number(
    trained: Callable[..., tuple[Any, Path]], tmp_path: Path, dtype: torch.dtype
) -> None:
    """kohya's scripts write a whole number as one."""
    model, _ = trained()
    state = {f"transformer.{key}": value for key, value in tensors(model).items()}
    state |= {f"{key.partition('.lora_')[0]}.alpha": torch.tensor(6).to(dtype) for key in state}
    save_file(state, tmp_path / WEIGHTS)
    assert set(read_teacher(tmp_path / WEIGHTS).alphas.values()) == {6.0}


OTHERS = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@pytest.mark.parametrize(("other", "name"), OTHERS.items(), ids=OTHERS.values())
def test_quantised_and_packed_numbers_are_refused_by_name(
    trained: Callable[..., tuple[Any, Path]], tmp_path: Path, other: torch.dtype, name: str
) -> None:
    """Taken for numbers they would be another LoRA: the scale that makes numbers of them is not in a LoRA's file."""
    model, _ = trained()
    state = {f"transformer.{key}": value for key, value in tensors(model).items()}
    key = next(key for key in state if ".lora_A." in key)
    save_file({**state, key: (100 * state[key]).to(other)}, tmp_path / WEIGHTS)
    message = f"{key} is of type {name}; supported are float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"
    with pytest.raises(InvalidError, match=message):
        read_teacher(tmp_path / WEIGHTS)
    assert f"is of type {name}" in str(inspect(tmp_path / WEIGHTS).refusal)
