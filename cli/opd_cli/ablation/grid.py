"""A grid of changes of one spec: which runs it stands for."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from opd_core.api.changes import Loader
from opd_core.api.digests import digest
from opd_core.errors import InvalidError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_MOST_CELLS = 10_000
SEED = "training.seed"


class Grid(BaseModel):
    """The file of an ablation.

    Args:
        spec: an OPDDistillation, relative to this file. set: changes that all runs have.
        grid: values by the path of a field, as `opd run --set` writes it; every combination is a run for every seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: str
    set: dict[str, Any] = {}
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = [42]


@dataclass(frozen=True)
class Cell:
    """One run: `values` of the grid's fields by path, and a seed; `changes` as --set takes them."""

    values: Mapping[str, Any]
    seed: int
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{digest(self.values)[:8]}-seed-{self.seed}"

    @property
    def words(self) -> str:
        return ", ".join(f"{path.rpartition('.')[2]} {shown(value)}" for path, value in self.values.items())


def read_grid(file: Path) -> Grid:
    """
    Raises:
        InvalidError: it cannot be read, or is no grid.
    """
    try:
        return Grid.model_validate(yaml.load(file.read_text(), Loader))  # noqa: S506  (a SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise InvalidError(
            f"{file}: {place}: {first['msg']}; write spec: FILE, grid: {{PATH: [VALUE, ...]}}, and if you like set: "
            "{PATH: VALUE} and seeds: [1, 2, 3]"
        ) from error


def cells(grid: Grid) -> list[Cell]:
    """All runs: seeds of one combination follow one another.

    Raises:
        InvalidError: too many, one twice, or a field that is said in two places.
    """
    paths = [path.removeprefix("spec.") for path in (*grid.grid, *grid.set, SEED)]
    if said := [path for path in paths if paths.count(path) > 1]:
        raise InvalidError(f"{said[0]} is said twice: write seeds in seeds, and any other field in set or in grid")
    count = len(grid.seeds)
    for each in grid.grid.values():
        count *= len(each)
    if count > _MOST_CELLS:
        raise InvalidError(f"the grid has {count} runs; write at most {_MOST_CELLS}")
    found = []
    for combination in itertools.product(*grid.grid.values()):
        values = dict(zip(grid.grid, combination, strict=True))
        for seed in grid.seeds:
            changes = [f"{path}={json.dumps(value)}" for path, value in {**grid.set, **values, SEED: seed}.items()]
            found.append(Cell(values, seed, tuple(changes)))
    names = Counter(cell.name for cell in found)
    if twice := next((cell for cell in found if names[cell.name] > 1), None):
        raise InvalidError(f"the grid has {twice.words}, seed {twice.seed}, twice; write each value once")
    return found


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def varied(found: Sequence[Cell]) -> list[str]:
    """Paths of the grid, in its order."""
    return list(found[0].values)
