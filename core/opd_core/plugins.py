"""What other packages bring: rewards, objectives and solvers, by registered name (entry point) or as
`module:function`."""

import importlib
from importlib.metadata import entry_points
from typing import Any

from opd_core.errors import InvalidError


def find_plugin(kind: str, name: str) -> Any:
    """The object called `name` among the `kind`s ("reward", "objective", "solver"): of the entry-point group
    diffusion_opd.rewards and so on.

    Raises:
        InvalidError: unknown, or a package of it cannot be imported.
    """
    return _imported(kind, name) if ":" in name else _registered(kind, name)


def _imported(kind: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidError(f"{kind} {name} cannot be imported: {error}; install its package beside this one") from error


def _registered(kind: str, name: str) -> Any:
    group = f"diffusion_opd.{kind}s"
    registered = {entry.name: entry for entry in entry_points(group=group)}
    if name not in registered:
        known = ", ".join(sorted(registered)) or "none"
        raise InvalidError(
            f"there is no {kind} {name}; registered are {known}. Install the package that brings it (entry-point group "
            f"{group}), or write module:function"
        )
    try:
        return registered[name].load()
    except ImportError as error:
        raise InvalidError(f"{kind} {name} needs a package that is missing: {error}") from error
