"""What a model's files say about it before a number of it is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.errors import InvalidError
from opd_core.models.headers import read_header, read_json, weight_files

FAMILIES = ("StableDiffusion3Pipeline",)  # classes of diffusers
_WEIGHTED = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of a component's weights, by library
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Outline:
    """How a model turns pixels into latents, and the configuration of its scheduler."""

    scheduler_config: dict[str, Any]
    patch_size: int
    latent_channels: int
    latent_scale: int  # image pixels per latent pixel, along one side
    max_side: int = 1 << 16  # in pixels

    @property
    def size_multiple(self) -> int:
        """Width and height of an image must be multiples of this many pixels."""
        return self.latent_scale * self.patch_size

    def takes(self, side: int) -> bool:
        """Whether an image may have a side of so many pixels."""
        return 0 < side <= self.max_side and side % self.size_multiple == 0

    @property
    def sides(self) -> str:
        """Which sides it takes, in words."""
        return f"a multiple of {self.size_multiple} up to {self.max_side}"

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image.

        Raises:
            InvalidError: a side that the model cannot produce.
        """
        for name, side in (("width", width), ("height", height)):
            if not self.takes(side):
                raise InvalidError(f"{name} is {side}; this model needs {self.sides}")
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale


def read_outline(path: Path) -> Outline:
    """The outline of the model in `path`, diffusers' folder format.

    Raises:
        InvalidError: not a model that this project can train or serve.
    """
    family_of(path)
    transformer = read_json(path / "transformer" / "config.json")
    vae = read_json(path / "vae" / "config.json")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Outline(
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        patch_size=transformer["patch_size"],
        latent_channels=transformer["in_channels"],
        latent_scale=scale,
        max_side=transformer["pos_embed_max_size"] * transformer["patch_size"] * scale,
    )


def family_of(path: Path) -> str:
    """Class name of the pipeline in `path`.

    Raises:
        InvalidError: no model, or none of `FAMILIES`.
    """
    family = str(read_json(path / "model_index.json").get("_class_name"))
    if family not in FAMILIES:
        raise InvalidError(f"{path} holds a {family}; supported are {', '.join(FAMILIES)}")
    return family


@dataclass(frozen=True)
class Component:
    """A part of a model: its folder, and the files of its weights, none for a tokenizer or a scheduler."""

    name: str
    folder: Path
    weights: list[Path]


def components(path: Path) -> list[Component]:
    """The parts of the model in `path` with the files that are loaded for them; other files take no part.

    Raises:
        InvalidError: a part without weights, or from whose folder something else would be loaded than its safetensors.
    """
    found = []
    for name, value in sorted(read_json(path / "model_index.json").items()):
        library = value[0] if isinstance(value, list) and len(value) == 2 else None
        if library is None:
            continue
        if library not in _STEMS:
            raise InvalidError(
                f"{path / 'model_index.json'} takes {name} from {library}; known are {', '.join(_STEMS)}"
            )
        _refuse_other_weights(path / name)
        found.append(
            Component(name, path / name, weight_files(path / name, _STEMS[library]) if name in _WEIGHTED else [])
        )
    return found


def _refuse_other_weights(folder: Path) -> None:
    """Whatever could be loaded in the place of the weights that the fingerprint covers."""
    for file in sorted(folder.glob("*")):
        if file.suffix in _PICKLES:
            raise InvalidError(
                f"{file} is a pickle, which is never loaded; remove it, and save the model as safetensors"
            )
    if (folder / "adapter_config.json").exists():  # transformers puts such an adapter on the model that it loads
        raise InvalidError(f"{folder} holds adapter_config.json; merge the adapter into the model, or remove it")
    config = folder / "config.json"
    if config.is_file() and "transformers_weights" in read_json(config):
        raise InvalidError(f"{config} names other weights in transformers_weights; remove it")


def linear_layers(path: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the model's transformer, by module name, from its weights' headers.

    Raises:
        InvalidError: a component of the model has no weights, or damaged ones.
    """
    shapes = {
        part.name: {name: shape for file in part.weights for name, shape in read_header(file).shapes.items()}
        for part in components(path)
    }
    if "transformer" not in shapes:
        raise InvalidError(f"{path / 'model_index.json'} names no transformer; copy the model again")
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes["transformer"].items()
        if name.endswith(".weight") and len(shape) == 2
    }
