"""A prompt's tensors as bytes: a safetensors file, checked against what the server's description says."""

from safetensors import SafetensorError
from safetensors.torch import load, save

from opd_core.conditioning import Conditioning
from opd_core.errors import InvalidError
from opd_core.precision import TORCH_DTYPES
from opd_core.teachers.contract import DTYPES, FREE, MASK, ServiceInfo


def write_conditioning(info: ServiceInfo, conditioning: Conditioning) -> bytes:
    """Prompts of equal shapes have equally many bytes."""
    cast = conditioning.cast(TORCH_DTYPES[info.precision])
    return save({name: tensor.cpu().contiguous() for name, tensor in cast.tensors.items()})


def read_conditioning(info: ServiceInfo, content: bytes) -> Conditioning:
    """What `write_conditioning` wrote, on the CPU.

    Raises:
        InvalidError: no safetensors file, or other tensors than the server's model takes.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvalidError(f"a row of conditioning is no safetensors file: {error}") from error
    expected = {
        name: ("torch.bool" if name == MASK else DTYPES[info.precision], shape)
        for name, shape in info.conditioning.items()
    }
    found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if expected.keys() != found.keys() or not all(_fits(found[name], *expected[name]) for name in expected):
        raise InvalidError(
            f"conditioning holds {_words(found)}; this server takes {_words(expected)}, where {FREE} is any size"
        )
    return Conditioning(tensors)


def _fits(found: tuple[str, tuple[int, ...]], dtype: str, shape: tuple[int, ...]) -> bool:
    sizes = found[1]
    return (
        found[0] == dtype
        and len(sizes) == len(shape)
        and all(wanted in (size, FREE) and size > 0 for size, wanted in zip(sizes, shape, strict=True))
    )


def _words(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    told = [f"{name} {dtype.removeprefix('torch.')} {list(shape)}" for name, (dtype, shape) in sorted(tensors.items())]
    return ", ".join(told)[:500] or "nothing"
