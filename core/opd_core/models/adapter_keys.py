"""Names of tensors in LoRA files of several writers, as PEFT's names relative to the transformer."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from opd_core.errors import InvalidError
from opd_core.models.pairs import HIGH, NETWORKS

PREFIX = f"{HIGH}."  # of a transformer's layers in diffusers' format, whatever the family
DIFFUSERS = tuple(f"{network}." for network in NETWORKS)  # of a pair's, in one file
PEFT_PREFIX = "base_model.model."
PREFIXES = (PREFIX, PEFT_PREFIX, "diffusion_model.", "")  # diffusers', PEFT's, ComfyUI's, none
# Of the text encoders: diffusers' and PEFT's, ComfyUI's, kohya's (lora_te1_), OneTrainer's embeddings of new words.
_TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "text_encoders.", "lora_te", "bundle_emb.")
_PAIR = re.compile(
    r"(?P<layer>[\w.-]+?)\.lora(?P<side>_A|_B|_down|_up|\.down|\.up)(?:\.(?P<adapter>[^.\s]+))?\.weight"
)  # `adapter` where PEFT's state was saved without save_pretrained: lora_A.default.weight
_SIDES = {"_A": "A", "_down": "A", ".down": "A", "_B": "B", "_up": "B", ".up": "B"}
_ALPHA = ".alpha"
_LONGEST = 512  # of a name
# What stands in a key, and what the file then is.
_FORMATS = {
    "lokr_": "a LoKr adapter; train a plain LoRA",
    "hada_": "a LoHa adapter; train a plain LoRA",
    "oft_": "an OFT adapter; train a plain LoRA",
    "dora_scale": "a DoRA; train a plain LoRA",
    "lora_magnitude_vector": "a DoRA; train a plain LoRA",
    "lora_mid": "a LoCon adapter (lora_mid); train a plain LoRA",
    "lora_embedding_": "a LoRA of embeddings; train a LoRA of linear layers",
    "lora_A.bias": "a LoRA with biases (lora_bias); train one without",
    "lora_B.bias": "a LoRA with biases (lora_bias); train one without",
    ".diff": "a LoRA with whole differences of weights or biases (.diff, .diff_b); train one without",
    ".processor.": "a LoRA in XLabs' format, which no longer is written; train a plain LoRA",
    "to_q_lora.": "diffusers' format of attention processors; save it again with PEFT's names",
}


class Format(StrEnum):
    """Whose format a LoRA is written in."""

    DIFFUSERS = "diffusers"
    PEFT = "peft"
    COMFYUI = "comfyui"
    MERGED = "merged"  # no LoRA: the base with it, as a model


@dataclass(frozen=True)
class AdapterKeys:
    """`tensors`: keys in the file by PEFT's key, such as `transformer_blocks.0.attn.to_q.lora_A.weight`; `alphas`: keys
    in the file of scalars that scale a layer, by the layer."""

    tensors: Mapping[str, str]
    alphas: Mapping[str, str]


def adapter_keys(file: Path, shapes: Mapping[str, tuple[int, ...]], prefixes: Iterable[str] = PREFIXES) -> AdapterKeys:
    """What the tensors of a LoRA's file are.

    Args:
        shapes: by key in the file, all of which begin with one of `prefixes`.

    Raises:
        InvalidError: a file of another kind, named as what it is.
    """
    _refuse_other_formats(file, shapes)
    prefix = next(prefix for prefix in prefixes if all(key.startswith(prefix) for key in shapes))
    tensors, alphas, adapters = {}, {}, set()
    for key in shapes:
        name = key.removeprefix(prefix)
        pair = _PAIR.fullmatch(name) if len(name) <= _LONGEST else None
        if pair is not None:
            tensors[f"{pair['layer']}.lora_{_SIDES[pair['side']]}.weight"] = key
            adapters.add(pair["adapter"])
        elif name.endswith(_ALPHA):
            alphas[name.removesuffix(_ALPHA)] = key
        else:
            raise InvalidError(
                f"{file} is not a LoRA of a transformer: it holds {key[:120]}; expected keys such as "
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
            )
    if len(adapters) > 1:
        raise InvalidError(f"{file} holds adapters {', '.join(sorted(map(str, adapters)))}; save one alone")
    if len(tensors) + len(alphas) < len(shapes):
        raise InvalidError(f"{file} holds one tensor under two names; save it again")
    return AdapterKeys(tensors, alphas)


def _refuse_other_formats(file: Path, keys: Iterable[str]) -> None:
    keys = list(keys)
    if not keys:
        raise InvalidError(f"{file} is not a LoRA: it holds no tensor at all")
    of_text = [key for key in keys if key.startswith(_TEXT)]
    if of_text:
        raise InvalidError(
            f"{file} changes the text encoders ({len(of_text)} of {len(keys)} tensors, e.g. {of_text[0][:120]}), which "
            "teachers and student share with the base; train one of the transformer alone (diffusers without "
            "--train_text_encoder, sd-scripts with --network_train_unet_only)"
        )
    for part, what in _FORMATS.items():
        found = next((key for key in keys if part in key), None)
        if found is not None:
            raise InvalidError(f"{file} is {what} (it holds {found[:120]})")
