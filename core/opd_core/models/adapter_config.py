"""PEFT's configuration of a LoRA: what of it is understood is a list, and everything else is refused by its name."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from opd_core.errors import InvalidError

# Say how an adapter was trained or saved, not what it computes.
_WITHOUT_EFFECT = frozenset(
    {"arrow_config", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode",
     "layers_pattern", "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
     "revision", "runtime_config", "task_type"}
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of a LoRA on the base as it is
_NAME = re.compile(r"\^?[\w.]+")  # of a layer, or its end


def _empty_is(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


class AdapterConfig(BaseModel):
    """The fields that decide what a LoRA computes. A list of `target_modules` holds ends of layer names."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    use_rslora: Annotated[bool, _empty_is(False)] = False
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], _empty_is({})] = {}
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], _empty_is({})] = {}
    init_lora_weights: bool | str | None = True
    bias: Annotated[str, _empty_is("none")] = "none"
    peft_type: Annotated[str, _empty_is("LORA")] = "LORA"

    def rank(self, layer: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if _names(key, layer)), self.r)

    def alpha(self, layer: str) -> float:
        return next((alpha for key, alpha in self.alpha_pattern.items() if _names(key, layer)), self.lora_alpha)

    @property
    def complete_targets(self) -> list[str] | None:
        """The ends of the names of all layers that it changes; None where only the tensors say which they are."""
        whole = isinstance(self.target_modules, list) and not self.exclude_modules and self.layers_to_transform is None
        return self.target_modules if whole and isinstance(self.target_modules, list) else None


def adapter_config(fields: Mapping[str, Any], source: str) -> AdapterConfig:
    """The configuration that `source` holds.

    Raises:
        InvalidError: a field is missing, has a value of another kind, or says that this is no plain LoRA.
    """
    try:
        config = AdapterConfig.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        if first["type"] == "missing":
            raise InvalidError(f"{source} has no {place}") from error
        raise InvalidError(f"{source}: {place} is {_short(first['input'])}: {first['msg']}") from error
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise InvalidError(
            f"{source}: init_lora_weights is {config.init_lora_weights}, which changes the base's own weights when the "
            "adapter is made, so that the file fits no other base; save it as a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    others = {"bias": config.bias != "none", "peft_type": config.peft_type != "LORA"}
    strange = [name for name, is_strange in others.items() if is_strange]
    extra = config.model_extra or {}
    strange += sorted(name for name, value in extra.items() if value and name not in _WITHOUT_EFFECT)
    if strange:
        told = ", ".join(f"{name} {_short(extra.get(name, getattr(config, name, None)))}" for name in strange)
        raise InvalidError(f"{source} uses {told}, which is not supported; train a plain LoRA")
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not _NAME.fullmatch(key):
                raise InvalidError(
                    f"{source}: {field} names {_short(key)}, a regular expression; supported are names of layers and "
                    "their ends"
                )
    return config


def ends_with(layer: str, target: str) -> bool:
    """PEFT's rule for a name in a list: the layer's own, or the end of it."""
    return layer == target or layer.endswith(f".{target}")


def _names(key: str, layer: str) -> bool:
    """PEFT's rule for a key of a pattern; one that begins with ^ is the whole name."""
    return layer == key[1:] if key.startswith("^") else ends_with(layer, key)


def _short(value: object) -> str:
    return str(value)[:80]
