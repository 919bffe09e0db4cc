"""Finds the family of a model's files: by the pipeline that they name, among the entry points of installed packages."""

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from opd_core.errors import InvalidError
from opd_core.families.family import Family
from opd_core.models.headers import read_json

GROUP = "diffusion_opd.families"  # entry points, each named as the pipeline's class in diffusers


def family_of(path: Path) -> Family:
    """The family of the model in `path`, diffusers' folder format.

    Raises:
        InvalidError: no model, or one of a family that nobody has registered.
    """
    return find_family(str(read_json(path / "model_index.json").get("_class_name")), str(path))


def families() -> list[Family]:
    """All that somebody has registered, in the order of their pipelines' names.

    Raises:
        InvalidError: one cannot be imported.
    """
    return [find_family(name, GROUP) for name in sorted({entry.name for entry in entry_points(group=GROUP)})]


@cache
def find_family(pipeline: str, source: str) -> Family:
    """The family whose models have this pipeline; `source` is where the name stands.

    Raises:
        InvalidError: nobody has registered it, or it cannot be imported.
    """
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if pipeline not in registered:
        raise InvalidError(f"{source} holds a {pipeline}; supported are {', '.join(sorted(registered))}")
    try:
        family: Family = registered[pipeline].load()
    except ImportError as error:
        raise InvalidError(f"the family of {pipeline} cannot be imported: {error}") from error
    return family
