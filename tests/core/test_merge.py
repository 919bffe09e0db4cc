"""Several LoRAs in one, for a student to start from."""

import pytest
import torch
from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_adapter_file
from opd_core.models.adapter_layers import named
from opd_core.models.adapters import (
    adapter_parameters,
    add_student_adapter,
    load_adapter,
    model_layers,
    save_adapter,
)
from opd_core.models.merge import merge
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from tests.core.test_models import TARGETS, transformer
from tests.loras import as_kohya


@pytest.fixture
def make(tmp_path):
    def saved(rank, alpha, targets=TARGETS, width=16):
        model = transformer(width=width)
        add_student_adapter(model, rank=rank, alpha=alpha, target_modules=targets, seed=rank)
        noise = torch.Generator().manual_seed(rank)
        for parameter in adapter_parameters(model):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
        path = tmp_path / f"lora-{rank}-{alpha}-{len(targets)}-{width}"
        save_adapter(model, path)
        return path

    return saved


def read(paths):
    return [read_adapter_file(path) for path in paths]


def test_every_layer_changes_by_the_mean_of_the_changes(make, tmp_path):
    paths = [make(4, 16), make(6, 6), make(2, 8)]
    config = merge(read(paths), tmp_path / "merged")
    assert (config.r, config.lora_alpha) == (12, 48)
    model = transformer()
    for name, path in (("a", paths[0]), ("b", paths[1]), ("c", paths[2]), ("merged", tmp_path / "merged")):
        load_adapter(model, read_adapter_file(path), name)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) > 10
    for layer in layers:
        mean = sum(layer.get_delta_weight(name) for name in "abc") / 3
        torch.testing.assert_close(layer.get_delta_weight("merged"), mean, rtol=1e-5, atol=1e-7)


def test_a_scale_that_gives_no_whole_alpha_is_made_up_for(make, tmp_path):
    paths = [make(3, 1), make(4, 8)]
    config = merge(read(paths), tmp_path / "merged")
    assert (config.r, config.lora_alpha) == (7, 2)
    model = transformer()
    for name, path in (("a", paths[0]), ("b", paths[1]), ("merged", tmp_path / "merged")):
        load_adapter(model, read_adapter_file(path), name)
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    mean = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2
    torch.testing.assert_close(layer.get_delta_weight("merged"), mean, rtol=1e-5, atol=1e-7)


def test_what_has_no_mean_is_refused_and_nothing_is_written(make, tmp_path):
    good, out = make(4, 16), tmp_path / "out"
    for paths, message in (
        ([good], "name two or more"),
        ([good, make(6, 6, TARGETS[:-1])], r"do not change the same layers: only one of them has .*add_v_proj"),
        ([good, make(6, 6, width=32)], "are they for one base"),
    ):
        with pytest.raises(InvalidError, match=message):
            merge(read(paths), out)
        assert not out.exists()


def test_an_adapter_that_is_there_stays(make):
    first, second = make(4, 16), make(6, 6)
    before = read_adapter_file(first)
    with pytest.raises(InvalidError, match="holds an adapter already; name another folder"):
        merge(read([first, second]), first)
    assert read_adapter_file(first) == before


def test_files_of_several_writers_have_the_mean_that_they_have_in_diffusers_format(make, tmp_path) -> None:
    paths, linear = [make(4, 16), make(6, 6)], model_layers(transformer())
    merge(read(paths), tmp_path / "plain")
    as_kohya(paths[1] / WEIGHTS, 6.0)
    with pytest.raises(InvalidError, match=r"e.g. lora_unet_.*; give the model that it is for with --base"):
        named(read_adapter_file(paths[1]), None)
    merge([named(adapter, linear) for adapter in read(paths)], tmp_path / "mixed")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "mixed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
