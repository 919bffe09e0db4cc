"""What a LoRA's file is, in words; nothing of it is loaded."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_core.errors import InvalidError
from opd_core.families.registry import find_family
from opd_core.models.adapter_file import AdapterFile, adapter_files, matches, read_teacher
from opd_core.models.adapter_layers import fit, plans
from opd_core.models.headers import read_header
from opd_core.models.outline import linear_layers
from opd_core.models.pairs import HIGH, LOW

# How all keys of a file begin, and whose way of writing that is.
_WRITERS = {
    "transformer.": "diffusers",
    "base_model.model.": "PEFT",
    "diffusion_model.": "ComfyUI, ai-toolkit",
    "lora_unet_": "kohya's sd-scripts, Musubi",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
# What writers note about the base in a file's metadata.
_NOTES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "base_model")
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Report:
    """`facts` by their names; `refusal`: why it is no teacher, on the base where one was given."""

    facts: Mapping[str, str]
    refusal: str | None


def inspect(path: Path, alpha: float | None = None, base: Path | None = None) -> Report:
    """The LoRA at `path`. `alpha` as `teachers[].adapter.alpha` states it.

    Raises:
        InvalidError: no safetensors file at all, or `base` is no model.
    """
    facts = dict(_of_files(adapter_files(path)))
    linear = None if base is None else linear_layers(base)
    try:
        adapter = read_teacher(path, alpha)
        facts |= _of_adapter(adapter)
        if linear is None:
            facts["family"] = _families(adapter)
        else:
            fitted = fit(adapter, linear)
            facts["base"] = f"fits, {len(fitted.layers)} of its {len(linear)} linear layers"
    except InvalidError as error:
        return Report(facts, str(error))
    return Report(facts, None)


def _of_files(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    headers = [read_header(file) for file in files]
    yield "file", "\n".join(f"{file}, {file.stat().st_size / 2**20:.1f} MiB" for file in files)
    yield "tensors", _counted(dtype for header in headers for dtype in header.dtypes.values())
    keys = [key.replace(f"{LOW}.", f"{HIGH}.", 1) for header in headers for key in header.shapes]
    writer = next(
        (f"{name} ({begin})" for begin, name in _WRITERS.items() if all(k.startswith(begin) for k in keys)), ""
    )
    yield "format", writer or "bare or mixed names"
    for note in _NOTES:
        if note in headers[0].metadata:
            yield note, " ".join(headers[0].metadata[note].split())[:80]


def _of_adapter(adapter: AdapterFile) -> dict[str, str]:
    kinds = Counter(begin + _NUMBERS.sub("*", layer) for begin, part in adapter.parts for layer in part.layers)
    return {
        "rank": _counted(f"{adapter.rank(layer)}" for layer in adapter.layers),
        "alpha": f"{_counted(f'{alpha:g}' for alpha in adapter.alphas.values())}, from {adapter.source}",
        "scale": _counted(f"{adapter.scale(layer):.4g}" for layer in adapter.layers)
        + (", alpha / sqrt(rank)" if adapter.rslora else ", alpha / rank"),
        "layers": "\n".join([f"{len(adapter.layers)}", *(f"{count:4} x {kind}" for kind, count in kinds.items())]),
    }


def _families(adapter: AdapterFile) -> str:
    """The authors' own names of layers are known to one family's converter; diffusers' names to many families."""
    found = []
    (_, one), *_ = adapter.parts
    for plan in () if one.named_by_diffusers else plans(one):
        targets = find_family(plan.pipeline, str(adapter.file)).targets
        if any(layer != part.source and matches(layer, targets) for layer, part in plan.parts.items()):
            lost = f", which has no place for {len(plan.lost)} of them, e.g. {plan.lost[0]}" if plan.lost else ""
            found.append(f"{plan.pipeline} by the names of layers{lost}")
    return "; ".join(found) or "not told by the names of layers; --base tells whether it fits"


def _counted(values: Iterable[str]) -> str:
    """ "16" where all are, else "16 (300 x), 8 (4 x)"."""
    counts = Counter(values)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{v} ({n} x)" for v, n in counts.most_common())
