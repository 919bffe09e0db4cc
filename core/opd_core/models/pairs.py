"""Models of two networks, one for high and one for low noise: their layers have the network's name before their own."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from opd_core.errors import InvalidError

_T = TypeVar("_T")

HIGH, LOW = "transformer", "transformer_2"  # as diffusers calls the networks, and the only one of other models
NETWORKS = (HIGH, LOW)
# Of a pair of LoRAs in one folder, by network: files or folders in whose names that stands, and what we call them.
FOLDERS = {HIGH: "high_noise", LOW: "low_noise"}
_NOISE = {HIGH: re.compile(r"high[-_ ]?noise", re.IGNORECASE), LOW: re.compile(r"low[-_ ]?noise", re.IGNORECASE)}


def split(named: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """By network, without its name; none where not every name begins with one."""
    if not all(name.startswith(tuple(f"{network}." for network in NETWORKS)) for name in named):
        return {}
    return {
        network: {name.removeprefix(f"{network}."): value for name, value in named.items() if _is_of(name, network)}
        for network in NETWORKS
        if any(_is_of(name, network) for name in named)
    }


def joined(networks: Mapping[str, Mapping[str, _T]]) -> dict[str, _T]:
    """The reverse of `split`."""
    return {f"{network}.{name}": value for network, named in networks.items() for name, value in named.items()}


def narrowed(targets: Iterable[str], network: str) -> list[str]:
    """Names of layers of both networks, or their ends, as names within one: those of the other are left out."""
    others = tuple(f"{other}." for other in NETWORKS if other != network)
    return [target.removeprefix(f"{network}.") for target in targets if not target.startswith(others)]


def noise_files(folder: Path) -> dict[str, Path]:
    """The LoRAs in a folder whose names say for which noise they are, by network; none where no name does.

    Raises:
        InvalidError: several for one network.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if entry.suffix == ".safetensors" or entry.is_dir()]
    found: dict[str, Path] = {}
    for network, pattern in _NOISE.items():
        named = [entry for entry in entries if pattern.search(entry.name)]
        if len(named) > 1:
            raise InvalidError(
                f"{folder} holds several LoRAs for one network, {' and '.join(entry.name for entry in named)}; leave "
                "one for high and one for low noise in it"
            )
        if named:
            found[network] = named[0]
    return found


def _is_of(name: str, network: str) -> bool:
    return name.startswith(f"{network}.")
