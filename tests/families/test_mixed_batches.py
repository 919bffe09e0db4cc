"""Rows of several LoRAs in one batch: every family's layers know whose tokens they compute."""

from pathlib import Path

import pytest
import torch
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.adapters import load_adapter, model_layers, use_adapter
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.pipeline import load_model
from opd_core.scales import Scales
from opd_core.teachers.contract import BASE
from opd_core.teachers.engine import Engine, Query

from tests.loras import random_lora

from .test_families import LONGEST, NAMES, PROMPTS, FolderOf, apart, shape_of

TEACHERS = ("first", "second")


@pytest.mark.parametrize("name", NAMES)
def test_each_row_has_its_own_lora_in_every_linear_layer(folder_of: FolderOf, name: str, tmp_path: Path) -> None:
    """Of all of them, the modulation's, the time's and the text's included. Two prompts of different lengths make two
    passes of three rows, each guided."""
    model, peft = (load_model(folder_of(name)) for _ in range(2))
    linear = model_layers(model.transformer)
    adapters = {}
    for seed, teacher in enumerate(TEACHERS):
        ranks = dict.fromkeys(linear, 2 + seed)
        adapters[teacher] = read_teacher(random_lora(tmp_path / teacher, linear, ranks, ranks, seed=seed, std=0.2))
        load_adapter(peft.transformer, adapters[teacher], teacher)
    prints = {teacher: adapter_fingerprint(adapter) for teacher, adapter in adapters.items()}
    engine = Engine(model, TEACHERS, AdapterPool(model.transformer, adapters, prints))
    numbers = [0, BASE, 1, 1, 0, BASE]
    told = [prompt for prompt in model.encode(PROMPTS, LONGEST) for _ in range(3)]
    (negative,) = model.encode([""], LONGEST, negative=True)
    noise = torch.randn(6, *shape_of(model, name), generator=torch.Generator().manual_seed(1))
    sigmas, scales = torch.linspace(0.9, 0.3, 6), Scales(3.0, 2.0)
    answer = engine.answer(
        Query(torch.tensor(numbers), noise, sigmas, torch.tensor([scales] * 6), told, [negative] * 6)
    )
    for i, number in enumerate(numbers):
        use_adapter(peft.transformer, None if number == BASE else TEACHERS[number])
        with torch.no_grad():
            alone = peft.velocity(
                noise[i : i + 1], sigmas[i : i + 1], peft.prompts(told[i : i + 1], [negative], [scales])
            )
        assert apart(answer[i : i + 1], alone) < 1e-4, (i, number)
    assert apart(answer[2], answer[3]) > 1e-3
