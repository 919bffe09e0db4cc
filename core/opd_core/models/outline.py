"""What a model's files say about it before a number of it is loaded."""

from dataclasses import dataclass
from pathlib import Path

from opd_core.errors import InvalidError
from opd_core.families.family import Outline
from opd_core.families.registry import family_of
from opd_core.models.headers import read_header, read_json, weight_files
from opd_core.models.pairs import HIGH, NETWORKS, joined

# What a component is, by how its name begins; schedulers and others have no weights.
PARTS = {"text": ("text_encoder", "tokenizer"), "transformer": ("transformer",), "vae": ("vae",)}
_CONFIGURED = ("transformer", "vae", "scheduler")
_WEIGHTED = ("transformer", "vae", "text_encoder")
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of a component's weights, by library
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def read_outline(path: Path) -> Outline:
    """The outline of the model in `path`, diffusers' folder format.

    Raises:
        InvalidError: not a model that this project can train or serve.
    """
    family, index = family_of(path), read_json(path / "model_index.json")
    files = {name: path / name / "config.json" for name in index}
    files |= {"scheduler": path / "scheduler" / "scheduler_config.json"}
    read = {name: read_json(file) for name, file in files.items() if name in _CONFIGURED or file.is_file()}
    try:
        return family.outline({"model_index": index, **read})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidError(
            f"{path} is no complete {family.pipeline}: its configurations lack {error}; copy it again"
        ) from error


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
            Component(
                name, path / name, weight_files(path / name, _STEMS[library]) if name.startswith(_WEIGHTED) else []
            )
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
    """(outputs, inputs) of every linear layer of the model's transformer, by module name, from its weights' headers. Of
    two transformers, their names are before those of their layers (`pairs`).

    Raises:
        InvalidError: a component of the model has no weights, or damaged ones.
    """
    shapes = {
        part.name: {name: shape for file in part.weights for name, shape in read_header(file).shapes.items()}
        for part in components(path)
    }
    if HIGH not in shapes:
        raise InvalidError(f"{path / 'model_index.json'} names no transformer; copy the model again")
    networks = {
        network: {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in shapes[network].items()
            if name.endswith(".weight") and len(shape) == 2
        }
        for network in NETWORKS
        if network in shapes
    }
    return joined(networks) if len(networks) > 1 else networks[HIGH]
