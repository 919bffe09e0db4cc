"""Whether a LoRA fits a base, whatever the file calls the base's layers.

Files name layers as diffusers does; with underscores for dots, behind `lora_unet_` (Musubi, OneTrainer); or as the
model's authors do, with q, k and v in one matrix (kohya's sd-scripts, ComfyUI). The last are told apart by diffusers'
own converters. A converter is not given a file's numbers but numbers that say where they stand: what it makes of them
is the plan by which the file is read. So a header is enough, nothing is dropped unseen, scales stay apart from weights,
and the file's precision stays.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from opd_core.errors import InvalidError
from opd_core.families.family import Family
from opd_core.families.registry import families
from opd_core.imports import without_collection
from opd_core.models.adapter_file import AdapterFile, check_fit, pair
from opd_core.models.adapter_keys import DIFFUSERS, PREFIX
from opd_core.models.pairs import split

if TYPE_CHECKING:
    from torch import Tensor

    Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

_FLAT = re.compile(r"(?:lora_unet_|lora_transformer_|lycoris_)(?P<layer>[\w-]+)")
_SPELLINGS = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up"))  # each known to some converters
_CANNOT = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
_LOGGER = "diffusers.loaders.lora_conversion_utils"


@dataclass(frozen=True)
class Part:
    """What changes a layer of the model: A of the file's layer `source`, and these rows of its B, (first, behind)."""

    source: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """`parts` by layer of the family's model; `lost`: layers of the file without a place there, or not as a whole."""

    pipeline: str
    parts: Mapping[str, Part]
    lost: Sequence[str]


def fit(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]]) -> AdapterFile:
    """The adapter with the base's own names of its layers.

    Args:
        linear: (outputs, inputs) of the transformer's linear layers by name.

    Raises:
        InvalidError: it was made for another base, does not fit its own metadata, or cannot be understood as a whole.
    """
    networks = split(linear)
    if adapter.halves:
        return _fit_halves(adapter, networks)
    if networks:
        raise InvalidError(
            f"{adapter.file} changes one network, and this model has two, for high and for low noise; point the URI at "
            "a folder with a LoRA for each, in whose names stand high_noise and low_noise"
        )
    if not linear.keys() >= set(adapter.layers) and not all(key.startswith(DIFFUSERS) for key in adapter.keys.values()):
        adapter = _arranged(adapter, _flat_parts(adapter, linear) or _converted_parts(adapter, linear))
    check_fit(adapter, linear)
    return adapter


def named(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]] | None) -> AdapterFile:
    """The adapter with diffusers' names of its layers: by `fit`, or as it is where its keys begin as only theirs do.

    Raises:
        InvalidError: as `fit`, or only a base can tell.
    """
    if linear is not None:
        return fit(adapter, linear)
    if not adapter.named_by_diffusers:
        raise InvalidError(
            f"{adapter.file} may name layers otherwise than diffusers does, e.g. {adapter.layers[0]}; give the model "
            "that it is for with --base"
        )
    return adapter


def _fit_halves(adapter: AdapterFile, networks: Mapping[str, Mapping[str, tuple[int, int]]]) -> AdapterFile:
    if not networks:
        raise InvalidError(
            f"{adapter.file} holds LoRAs for high and for low noise, and this model has one network for both; is it "
            "for another base?"
        )
    fitted = {network: fit(half, networks[network]) for network, half in adapter.halves.items()}
    as_they_were = all(fitted[network] is half for network, half in adapter.halves.items())
    return adapter if as_they_were else pair(adapter.file, fitted)


def plans(adapter: AdapterFile) -> list[Plan]:
    """What the families' converters make of the file's layers."""
    return [plan for family in families() if (plan := _plan(adapter, family)) is not None]


def _flat_parts(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
    """Where every layer has the name of a layer of the base with underscores for dots; else none."""
    names = {layer.replace(".", "_"): layer for layer in linear}
    parts = {}
    for source in adapter.layers:
        match = _FLAT.fullmatch(source)
        if match is None or match["layer"] not in names:
            return {}
        parts[names[match["layer"]]] = Part(source, ((0, adapter.outputs(source)),))
    return parts


def _converted_parts(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]]) -> Mapping[str, Part]:
    """By the converter that leads to most of the base's layers; none where none leads to any."""
    best = max(plans(adapter), key=lambda plan: (len(linear.keys() & plan.parts.keys()), -len(plan.lost)), default=None)
    if best is None or not linear.keys() & best.parts.keys():
        return {}
    if best.lost:
        raise InvalidError(
            f"{adapter.file} cannot be taken as a whole: the conversion of such files for {best.pipeline} has no place "
            f"for {len(best.lost)} of its {len(adapter.layers)} layers, e.g. {best.lost[0]}; is it for another base?"
        )
    return best.parts


def _arranged(adapter: AdapterFile, parts: Mapping[str, Part]) -> AdapterFile:
    if not parts:
        return adapter
    keys, shapes, rows = {}, {}, {}
    for layer, part in parts.items():
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        keys[a], keys[b] = (adapter.keys[f"{part.source}.lora_{side}.weight"] for side in "AB")
        shapes[a] = adapter.shapes[f"{part.source}.lora_A.weight"]
        shapes[b] = (sum(behind - first for first, behind in part.rows), adapter.rank(part.source))
        if part.rows != ((0, adapter.outputs(part.source)),):
            rows[b] = part.rows
    alphas = {layer: adapter.alphas[part.source] for layer, part in parts.items()}
    return replace(adapter, keys=keys, shapes=shapes, alphas=alphas, rows=rows, targets=None)


def _plan(adapter: AdapterFile, family: Family) -> Plan | None:
    """None where the family has no converter, or one that can do nothing with the file."""
    with without_collection():
        import diffusers

        theirs = getattr(getattr(diffusers, family.pipeline, None), "lora_state_dict", None)
    found: list[Plan] = []
    for convert in filter(None, (family.convert_lora, theirs)):
        for spelling in _SPELLINGS:
            answer = _ask(convert, _stand_ins(adapter, spelling))
            parts = dict(_parts(adapter, answer))
            found.append(Plan(family.pipeline, parts, _lost(adapter, parts.values())))
            if not found[-1].lost:
                return found[-1]
    return min(found, key=lambda plan: len(plan.lost), default=None)


def _ask(convert: "Convert", state: "dict[str, Tensor]") -> "Mapping[str, Tensor]":
    """A converter's answer without what it left as it was, {} where it refuses. What it has to say of names in a file
    is no text for a terminal."""
    given = set(state)
    logger = logging.getLogger(_LOGGER)
    before, logger.disabled = logger.disabled, True
    try:
        return {key: value for key, value in convert(state).items() if key not in given}
    except _CANNOT:
        return {}
    finally:
        logger.disabled = before


def _stand_ins(adapter: AdapterFile, spelling: tuple[str, str]) -> "dict[str, Tensor]":
    """Of rank 1: A holds the number of its layer, B a number for every row of the file, all exact in float64."""
    import torch

    state: dict[str, Any] = {}
    down, up = spelling
    for number, (source, first, behind) in enumerate(_numbered(adapter)):
        name = source if _FLAT.fullmatch(source) else f"diffusion_model.{source}"
        inputs = adapter.shapes[f"{source}.lora_A.weight"][1]
        state[f"{name}.{down}.weight"] = torch.full((1, inputs), number, dtype=torch.float64)
        state[f"{name}.{up}.weight"] = torch.arange(first, behind, dtype=torch.float64).unsqueeze(1)
    return state


def _numbered(adapter: AdapterFile) -> Iterator[tuple[str, int, int]]:
    """(layer, number of its first row, number behind its last one); 1 is the first, since zeros mean something."""
    behind = 1
    for source in adapter.layers:
        first, behind = behind, behind + adapter.outputs(source)
        yield source, first, behind


def _parts(adapter: AdapterFile, answer: "Mapping[str, Tensor]") -> Iterator[tuple[str, Part]]:
    numbered = list(_numbered(adapter))
    for key, value in answer.items():
        layer, _, side = key.removeprefix(PREFIX).partition(".lora_")
        b = answer.get(key.replace(".lora_A.", ".lora_B."))
        if side != "A.weight" or b is None:
            continue
        source, first, behind = numbered[int(value[0, 0])]
        numbers = [int(number) - first for number in b.flatten().tolist()]
        if all(0 <= number < behind - first for number in numbers):
            starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
            runs = pairwise([*starts, len(numbers)])
            yield layer, Part(source, tuple((numbers[i], numbers[j - 1] + 1) for i, j in runs))


def _lost(adapter: AdapterFile, parts: Iterable[Part]) -> list[str]:
    """Layers of the file of which not every row is used, once."""
    used: dict[str, list[int]] = {source: [] for source in adapter.layers}
    for part in parts:
        used[part.source] += (row for first, behind in part.rows for row in range(first, behind))
    return [source for source, rows in used.items() if sorted(rows) != list(range(adapter.outputs(source)))]
