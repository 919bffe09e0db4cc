"""A grid of changes of one spec: which runs it stands for."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from opd_core.api.changes import Loader
from opd_core.api.digests import digest
from opd_core.errors import InvalidError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_MOST_CELLS = 10_000
SEED = "training.seed"
VARIANT = "variant"  # among the values of a cell


class Grid(BaseModel):
    """The file of an ablation.

    Args:
        spec: an OPDDistillation, relative to this file. set: changes that all runs have.
        variants: sets of changes that belong together, by a name of their own.
        grid: values by the path of a field, as `opd run --set` writes it; every combination with every variant is a run
            for every seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: str
    set: dict[str, Any] = {}
    variants: dict[Annotated[str, Field(min_length=1, max_length=100)], dict[str, Any]] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: Annotated[list[int], Field(min_length=1)] = [42]


@dataclass(frozen=True)
class Cell:
    """One run: `values` of the grid's fields by path, with its variant's name and changes, if it is of one, and a seed;
    `changes` as --set takes them."""

    values: Mapping[str, Any]
    seed: int
    changes: tuple[str, ...]
    variant: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{digest({**self.values, **self.variant})[:8]}-seed-{self.seed}"

    @property
    def words(self) -> str:
        told = (
            shown(value) if path == VARIANT else f"{path.rpartition('.')[2]} {shown(value)}"
            for path, value in self.values.items()
        )
        return ", ".join(told)


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
            f"{file}: {place}: {first['msg']}; write spec: FILE, grid: {{PATH: [VALUE, ...]}} or variants: {{NAME: "
            "{PATH: VALUE}}, and if you like set: {PATH: VALUE} and seeds: [1, 2, 3]"
        ) from error


def cells(grid: Grid) -> list[Cell]:
    """All runs: every combination with the first seed, then with the next, so that a table is soon whole.

    Raises:
        InvalidError: too many, one twice, or a field that is said in two places.
    """
    if not grid.grid and not grid.variants:
        raise InvalidError("there is neither grid nor variants; write grid: {PATH: [VALUE, ...]}, what is to be varied")
    for variant in grid.variants.values() or [{}]:
        paths = [path.removeprefix("spec.") for path in (*grid.grid, *grid.set, *variant, SEED)]
        if said := [path for path in paths if paths.count(path) > 1]:
            raise InvalidError(
                f"{said[0]} is said twice: write seeds in seeds, and any other field in one of set, variants and grid"
            )
    count = len(grid.seeds) * max(1, len(grid.variants))
    for each in grid.grid.values():
        count *= len(each)
    if count > _MOST_CELLS:
        raise InvalidError(f"the grid has {count} runs; write at most {_MOST_CELLS}")
    found = []
    named = [({VARIANT: name}, changes) for name, changes in grid.variants.items()]
    combinations = itertools.product(*grid.grid.values())
    for seed, (name, changed), combination in itertools.product(grid.seeds, named or [({}, {})], combinations):
        values: dict[str, Any] = dict(zip(grid.grid, combination, strict=True))
        merged = {**grid.set, **changed, **values, SEED: seed}
        changes = tuple(f"{path}={json.dumps(value)}" for path, value in merged.items())
        found.append(Cell({**name, **values}, seed, changes, changed))
    names = Counter(cell.name for cell in found)
    if twice := next((cell for cell in found if names[cell.name] > 1), None):
        raise InvalidError(f"the grid has {twice.words}, seed {twice.seed}, twice; write each value once")
    return found


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def varied(found: Sequence[Cell]) -> list[str]:
    """Paths of the grid, in its order."""
    return list(found[0].values)
