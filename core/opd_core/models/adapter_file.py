"""What a LoRA's file says about it, and whether it fits a model: nothing is loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.adapter_config import AdapterConfig, adapter_config, ends_with
from opd_core.models.adapter_keys import DIFFUSERS, PEFT_PREFIX, PREFIX, PREFIXES, adapter_keys
from opd_core.models.headers import read_bytes, read_header, read_json
from opd_core.models.pairs import LOW, NETWORKS, joined, noise_files, split

_IN_BLOCK = re.compile(rf"((?:(?:{'|'.join(NETWORKS)})\.)?[^.]+)\.[0-9]+\.")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTERMETADATA_KEY
# What a matrix may be of: others are whole numbers, whose scale stands elsewhere, or are packed.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_ASSUMED = "the rank, as diffusers takes a file that states none"


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA on disk: a layer with matrices A [r, in] and B [out, r] changes by alpha / r B A.

    Args:
        keys: keys in the file by PEFT's key, `transformer_blocks.0.attn.to_q.lora_A.weight`.
        shapes: by PEFT's key.
        alphas: by layer.
        rslora: the scale is alpha / sqrt(r) instead.
        targets: ends of the names of all layers that it changes; None where only the tensors say.
        source: of the alphas, in words.
        stated: alpha as its user stated it, where the file has none.
        rows: by PEFT's key, (first, behind) of those of the file's matrix that are B, where it holds several layers'.
        halves: by network, the LoRAs of a model of two networks, in one file or in the folder `file`. Layers have the
            network's name before their own here, and `keys` is empty.
    """

    file: Path
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]
    source: str
    rslora: bool = False
    targets: Sequence[str] | None = None
    stated: float | None = None
    rows: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    halves: "Mapping[str, AdapterFile]" = field(default_factory=dict)

    @property
    def parts(self) -> "list[tuple[str, AdapterFile]]":
        """What is in a file of its own, or is one network's part of a file, with what its names begin with here."""
        return [(f"{network}.", half) for network, half in self.halves.items()] or [("", self)]

    @property
    def layers(self) -> list[str]:
        """Names of the layers it changes."""
        return sorted(self.alphas)

    @property
    def named_by_diffusers(self) -> bool:
        """Its layers have diffusers' names for sure: no other program begins its keys so."""
        keys = (key for _, part in self.parts for key in part.keys.values())
        return all(key.startswith((*DIFFUSERS, PEFT_PREFIX)) for key in keys)

    @property
    def notes(self) -> list[str]:
        """What is no fault but should be known: a scale that nobody stated is silent where it is wrong."""
        return [part._assumption for _, part in self.parts if part.source == _ASSUMED]

    @property
    def _assumption(self) -> str:
        ranks = " and ".join(f"{rank:g}" for rank in sorted(set(self.alphas.values())))
        return (
            f"{self.file} does not state its scale: it has no adapter metadata, no {PEFT_CONFIG} beside it and no "
            f".alpha tensors; it is taken with alpha = its rank, {ranks}, as diffusers takes it; if it was trained "
            "with another, write that as adapter.alpha of the teacher, or into the file with opd models export --alpha"
        )

    def rank(self, layer: str) -> int:
        return self.shapes[f"{layer}.lora_A.weight"][0]

    def outputs(self, layer: str) -> int:
        return self.shapes[f"{layer}.lora_B.weight"][0]

    def scale(self, layer: str) -> float:
        """What the product of the layer's two matrices is multiplied by."""
        rank = self.rank(layer)
        return float(self.alphas[layer] / (rank**0.5 if self.rslora else rank))


def weights_file(path: Path) -> Path:
    """The file of the LoRA at `path`.

    Raises:
        InvalidError: a folder without one.
    """
    if path.is_file():
        return path
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise InvalidError(f"{path} holds neither {WEIGHTS} nor {PEFT_WEIGHTS}; point the URI at a LoRA file or its folder")


def read_adapter_file(path: Path, alpha: float | None = None) -> AdapterFile:
    """The LoRA at `path`, a file or its folder. Of a model of two networks that is a file with both, told apart by
    diffusers' names of them, or a folder with two whose names say high_noise and low_noise.

    Its scale is taken from diffusers' metadata in the file, from adapter_config.json beside it, from tensors that end
    in .alpha, or is `alpha` / rank. Where nobody states it, it is 1, as diffusers and ComfyUI take such a file.

    Raises:
        InvalidError: not a plain LoRA of a transformer's linear layers, or one whose scale two state differently.
    """
    if halves := _noise_files(path):
        return pair(path, {network: _read(weights_file(half), alpha) for network, half in halves.items()})
    file = weights_file(path)
    networks = split(read_header(file).shapes)
    if LOW not in networks:
        return _read(file, alpha)
    return pair(file, {network: _read(file, alpha, f"{network}.") for network in networks})


def pair(file: Path, halves: Mapping[str, AdapterFile]) -> AdapterFile:
    """LoRAs of both networks of a model, or of one of them, as one. `file`: where they are, one file or a folder.

    Raises:
        InvalidError: the scales of the two are not of one kind.
    """
    first = next(iter(halves.values()))
    if len({half.rslora for half in halves.values()}) > 1:
        raise InvalidError(f"only one of the LoRAs in {file} has use_rslora; save both with or both without")
    return AdapterFile(
        file=file,
        keys={},
        shapes=joined({network: half.shapes for network, half in halves.items()}),
        alphas=joined({network: half.alphas for network, half in halves.items()}),
        source=" and ".join(dict.fromkeys(half.source for half in halves.values())),
        rslora=first.rslora,
        stated=first.stated,
        halves=halves,
    )


def adapter_files(path: Path) -> list[Path]:
    """The file of the LoRA at `path`, or those of a pair.

    Raises:
        InvalidError: a folder without one.
    """
    return [weights_file(half) for half in _noise_files(path).values()] or [weights_file(path)]


def _noise_files(path: Path) -> dict[str, Path]:
    own = (WEIGHTS, PEFT_WEIGHTS)
    return noise_files(path) if path.is_dir() and not any((path / name).is_file() for name in own) else {}


def _read(file: Path, alpha: float | None, begin: str | None = None) -> AdapterFile:
    """The LoRA of one network: of all keys of a file, or of those that begin so."""
    header = read_header(file)
    own = {key: shape for key, shape in header.shapes.items() if begin is None or key.startswith(begin)}
    keys = adapter_keys(file, own, PREFIXES if begin is None else (begin,))
    shapes = {key: header.shapes[stored] for key, stored in keys.tensors.items()}
    _check_types(file, {stored: header.dtypes[stored] for stored in keys.tensors.values()})
    ranks = _ranks(file, shapes)
    config = _config(file, header.metadata, begin or PREFIX)
    if config is not None and keys.alphas:
        raise InvalidError(
            f"{file} has a configuration and tensors such as {next(iter(keys.alphas.values()))}; save it again"
        )
    if config is not None:
        alphas, source = (
            _configured(file, ranks, config),
            "its metadata" if METADATA in header.metadata else PEFT_CONFIG,
        )
    elif keys.alphas:
        alphas, source = _stored(file, ranks, keys.alphas), "its .alpha tensors"
    elif alpha is not None:
        alphas, source = dict.fromkeys(ranks, float(alpha)), "what was stated"
    else:
        alphas, source = {layer: float(rank) for layer, rank in ranks.items()}, _ASSUMED
    if alpha is not None and set(alphas.values()) != {alpha}:
        told = ", ".join(f"{value:g}" for value in sorted(set(alphas.values())))
        raise InvalidError(f"alpha is stated as {alpha:g}, and {file} itself says {told}; leave adapter.alpha out")
    return AdapterFile(
        file=file,
        keys=keys.tensors,
        shapes=shapes,
        alphas=alphas,
        source=source,
        rslora=config is not None and config.use_rslora,
        targets=config.complete_targets if config is not None else None,
        stated=alpha,
    )


def read_teacher(path: Path, alpha: float | None = None) -> AdapterFile:
    """The LoRA of a teacher, which must differ from its base. `alpha`: of `teachers[].adapter`.

    Raises:
        InvalidError: as `read_adapter_file`; or it changes nothing, since every B is zero.
    """
    adapter = read_adapter_file(path, alpha)
    if not any(_changes(part) for _, part in adapter.parts):
        raise InvalidError(
            f"{adapter.file} changes nothing: all its B matrices are zero, so it would teach the base; was it trained?"
        )
    return adapter


def _changes(adapter: AdapterFile) -> bool:
    ups = {stored for key, stored in adapter.keys.items() if ".lora_B." in key}
    return any(
        name in ups and content.tobytes().count(0) < len(content) for name, _, _, content in read_bytes(adapter.file)
    )


def check_fit(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]]) -> None:
    """The adapter changes layers that are there, in their shape, and every layer that it says it changes.

    Args:
        linear: (outputs, inputs) of the transformer's linear layers by name.

    Raises:
        InvalidError: it was made for another base, or does not fit its own metadata.
    """
    for layer in adapter.layers:
        if layer not in linear:
            raise InvalidError(
                f"{adapter.file} adapts {layer}, and this model has no such linear layer; is it for another base?"
            )
        (outputs, inputs), rank = linear[layer], adapter.rank(layer)
        for side, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
            shape = adapter.shapes[f"{layer}.lora_{side}.weight"]
            if shape != expected:
                raise InvalidError(
                    f"{adapter.file}: {layer}.lora_{side}.weight has shape {shape}, but rank {rank} on this model "
                    f"needs {expected}; is the adapter for another base?"
                )
    if adapter.targets is None:
        return
    targeted = {name for name in linear if matches(name, adapter.targets)}
    missing, others = sorted(targeted - set(adapter.layers)), sorted(set(adapter.layers) - targeted)
    if missing or others:
        raise InvalidError(
            f"{adapter.file} does not fit its own metadata: of the layers that target_modules names {len(missing)} are "
            f"missing, and {len(others)} others are there, e.g. {(missing + others)[0]}; copy it again"
        )


def missed_blocks(targets: Sequence[str], linear: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Kinds of the model's blocks (`single_transformer_blocks`) in which a new adapter's targets name no layer, each
    with a layer that is there. Names written for another family silently miss some."""
    of_kind: dict[str, list[str]] = {}
    for layer in linear:
        if match := _IN_BLOCK.match(layer):
            of_kind.setdefault(match[1], []).append(layer)
    return {
        kind: next((layer for layer in layers if "attn" in layer or "attention" in layer), layers[0])
        for kind, layers in of_kind.items()
        if not any(matches(layer, targets) for layer in layers)
    }


def unknown_targets(targets: Sequence[str], linear: Mapping[str, tuple[int, int]]) -> list[str]:
    """Those of a new adapter's targets that name no layer of the model."""
    return [target for target in targets if not any(matches(name, [target]) for name in linear)]


def mean_alpha(scale: float, rank: int) -> int:
    """Alpha of a mean of LoRAs (`merge`): whole, for the `scale` of the first and the `rank` of all together."""
    return max(1, round(scale * rank))


def matches(name: str, targets: Sequence[str]) -> bool:
    """Whether an adapter with these targets changes the module `name`."""
    return any(ends_with(name, target) for target in targets)


def _check_types(file: Path, dtypes: Mapping[str, str]) -> None:
    for key, dtype in dtypes.items():
        if dtype not in _TYPES:
            supported = ", ".join(_TYPES.values())
            raise InvalidError(
                f"{file}: {key[:120]} is of type {dtype}; supported are {supported}: save it in one of them"
            )


def _ranks(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Rank by layer."""
    ranks = {}
    for key in shapes:
        layer = key.partition(".lora_")[0]
        a, b = (shapes.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            raise InvalidError(f"{file} is not whole: {layer} has no lora_{'A' if a is None else 'B'}; copy it again")
        if len(a) != 2 or len(b) != 2:
            raise InvalidError(f"{file}: {key} has shape {shapes[key]}; supported are LoRAs of linear layers")
        if a[0] != b[1] or a[0] == 0:
            raise InvalidError(f"{file}: A and B of {layer} have shapes {a} and {b}, which are of no common rank")
        ranks[layer] = a[0]
    return ranks


def _config(file: Path, metadata: Mapping[str, str], begin: str) -> AdapterConfig | None:
    """PEFT's configuration, from the file's own metadata or from the file beside it."""
    if METADATA in metadata:
        source = f"the adapter metadata of {file}"
        try:
            stored = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise InvalidError(f"{source} is not valid JSON: {error}; save it again") from error
        if not isinstance(stored, dict):
            raise InvalidError(f"{source} is no JSON object: {metadata[METADATA][:80]}; save it again")
        fields = {key.removeprefix(begin): value for key, value in stored.items() if key.startswith(begin)}
        if stored and not fields:
            raise InvalidError(
                f"{source} says nothing of the transformer: it has {next(iter(stored))[:80]}; save it again"
            )
        return adapter_config(fields, source)
    beside = file.parent / PEFT_CONFIG
    return adapter_config(read_json(beside), str(beside)) if beside.is_file() else None


def _configured(file: Path, ranks: Mapping[str, int], config: AdapterConfig) -> dict[str, float]:
    for layer, rank in ranks.items():
        if config.rank(layer) != rank:
            raise InvalidError(
                f"{file} has rank {rank} in {layer}, and {config.rank(layer)} by its configuration; is that of another "
                "adapter?"
            )
    return {layer: config.alpha(layer) for layer in ranks}


def _stored(file: Path, ranks: Mapping[str, int], keys: Mapping[str, str]) -> dict[str, float]:
    """The scalars that tools of kohya's school put beside the matrices."""
    from safetensors import safe_open  # with PyTorch, which knows every type of number

    if strange := sorted(ranks.keys() ^ keys.keys()):
        raise InvalidError(f"{file} has A, B and alpha not of the same layers, e.g. {strange[0]}; save it again")
    with safe_open(file, framework="pt") as opened:
        stored = {layer: opened.get_tensor(key) for layer, key in keys.items()}
    for layer, value in stored.items():
        if value.numel() != 1 or not 0 < float(value) < float("inf"):
            raise InvalidError(f"{file}: {keys[layer]} is no positive number: {str(value.tolist())[:80]}")
    return {layer: float(value) for layer, value in stored.items()}
