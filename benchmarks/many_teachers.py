"""Fifty LoRA teachers on one base: what they take of memory, and what a batch of all of them costs beside one teacher's.

    PYTHONPATH=.:tools python benchmarks/many_teachers.py [--teachers 50] [--rounds 5]

The base is a Stable Diffusion 3.5 of random numbers, narrow enough for a CPU and large enough that arithmetic, not the
start of operations, takes the time; each LoRA changes the layers that a student's does, at a student's rank. The same
rows, side by side: all of one teacher, by PEFT, as a server of one teacher would; all of one teacher, in the pool of all;
each of another teacher; each of another teacher, one pass a teacher; and PEFT's own mixed batch (`adapter_names`).
Operations are PyTorch's: each starts a kernel or more on a GPU. `--write` puts the figures into
docs/figures/many_teachers.json.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from figures import write
from opd_core.api.training import LoRA
from opd_core.conditioning import Conditioning
from opd_core.families.sd3 import SD3
from opd_core.models.adapter_file import AdapterFile, matches, read_teacher
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.adapters import load_adapter, model_layers, use_adapter
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.pipeline import Model
from opd_core.scales import Scales
from opd_core.teachers.engine import Engine, Query
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.loras import random_lora

CONFIG = {
    "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 64,
    "num_attention_heads": 8, "joint_attention_dim": 512, "caption_projection_dim": 512, "pooled_projection_dim": 256,
    "pos_embed_max_size": 32, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
OUTLINE = {"transformer": CONFIG, "vae": {"block_out_channels": [1] * 4}, "scheduler": {"shift": 3.0}}
SIDE, TOKENS = 32, 32  # of the latents, of a prompt
MIB = 2**20


class Operations(TorchDispatchMode):
    """How many operations are started."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def model_of(transformer: Any) -> Model:
    return Model(
        pipeline=SimpleNamespace(transformer=transformer), device=torch.device("cpu"), dtype=torch.float32,
        **vars(SD3.outline(OUTLINE)),
    )  # fmt: skip


def loras(folder: Path, transformer: Any, count: int) -> dict[str, AdapterFile]:
    linear, usual = model_layers(transformer), LoRA()
    layers = [layer for layer in linear if matches(layer, SD3.targets)]
    ranks, alphas = dict.fromkeys(layers, usual.rank), dict.fromkeys(layers, float(usual.alpha))
    names = [f"teacher-{i}" for i in range(count)]
    return {
        name: read_teacher(random_lora(folder / name, linear, ranks, alphas, seed=i, std=0.02))
        for i, name in enumerate(names)
    }


def peft_mixed(model: Model, names: list[str]) -> Callable[[Any], Tensor]:
    """PEFT's own way, as its PeftModel sets it up."""

    def answer(ask: Callable[[Model], Tensor]) -> Tensor:
        def named(_: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "adapter_names": names}

        layers = [module for module in model.transformer.modules() if isinstance(module, BaseTunerLayer)]
        hooks = [layer.register_forward_pre_hook(named, with_kwargs=True) for layer in layers]
        try:
            return ask(model)
        finally:
            for hook in hooks:
                hook.remove()

    return answer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/figures")
    options = parser.parse_args()
    count = options.teachers
    torch.manual_seed(0)
    base = SD3Transformer2DModel(**CONFIG).eval().requires_grad_(False)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        files = loras(Path(scratch), base, count)
        peft = model_of(copy.deepcopy(base))
        for name, file in files.items():
            load_adapter(peft.transformer, file, name)
        prints = {name: adapter_fingerprint(file) for name, file in files.items()}
        began = time.perf_counter()
        pool = AdapterPool(base, files, prints)
        loading = (time.perf_counter() - began) / count
    engine = Engine(model_of(base), tuple(files), pool)
    prompt = Conditioning(
        {
            "embeds": torch.randn(TOKENS, CONFIG["joint_attention_dim"]),
            "pooled": torch.randn(CONFIG["pooled_projection_dim"]),
        }
    )
    latents, sigmas, off = torch.randn(count, 16, SIDE, SIDE), torch.linspace(1.0, 0.1, count), Scales(1.0)
    told = [prompt] * count

    def ask(teachers: Tensor) -> Tensor:
        return engine.answer(Query(teachers, latents, sigmas, torch.tensor([off] * count), told, told))

    def of_peft(model: Model) -> Tensor:
        return model.velocity(latents, sigmas, model.prompts(told, told, [off] * count))

    def one_by_peft() -> Tensor:
        use_adapter(peft.transformer, "teacher-0")
        return of_peft(peft)

    def one_after_the_other() -> Tensor:
        each = (
            Query(torch.tensor([i]), latents[i : i + 1], sigmas[i : i + 1], torch.tensor([off]), told[:1], told[:1])
            for i in range(count)
        )
        return torch.cat([engine.answer(query) for query in each])

    ways: dict[str, Callable[[], Tensor]] = {
        "one teacher, by PEFT": one_by_peft,
        "one teacher": lambda: ask(torch.zeros(count, dtype=torch.int64)),
        f"{count} teachers": lambda: ask(torch.arange(count)),
        f"{count} teachers, a pass each": one_after_the_other,
        f"{count} teachers, by PEFT's adapter_names": lambda: peft_mixed(peft, list(files))(of_peft),
    }
    operations, answers = {}, {}
    for name, way in ways.items():  # and warms up
        with Operations() as counting:
            answers[name] = way()
        operations[name] = counting.count
    one, _, mixed, _, theirs = ways
    worst = (answers[mixed] - answers[theirs]).norm() / answers[theirs].norm()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(options.rounds):
        for name in list(ways) if i % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(of_one) for name, of_one in seconds.items()}
    table = ["| rows | seconds | beside one teacher, by PEFT | operations |", "|---|---|---|---|"]
    table += [
        f"| {name} | {medians[name]:.2f} | {medians[name] / medians[one]:.2f} | {operations[name]} |" for name in ways
    ]
    together, copies = base_bytes + pool.nbytes, count * base_bytes
    figures = {
        "ratio": f"{medians[mixed] / medians[one]:.2f}",
        "memory": f"{together / MIB:.0f}",
        "copies": f"{copies / MIB:.0f}",
        "base": f"{base_bytes / MIB:.0f}",
        "share": f"{copies / together:.0f}",
        "operations": f"{operations[mixed]}",
        "peft_operations": f"{operations[theirs]}",
        "loading": f"{1000 * loading:.0f}",
    }
    print("\n".join(table))
    print(f"one base and {count} LoRAs {together / MIB:.0f} MiB, {count} copies of the base {copies / MIB:.0f} MiB")
    print(f"loading a LoRA, its file checked: {1000 * loading:.0f} ms; from PEFT's answers {worst:.1e}")
    if options.write:
        write("many_teachers", figures, table)


if __name__ == "__main__":
    main()
