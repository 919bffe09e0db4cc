"""What a reward imports besides the trainer's own packages, and the message when it is missing."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from opd_core.errors import InvalidError

Factory = TypeVar("Factory", bound=Callable[..., Any])


def needs(module: str, package: str) -> Callable[[Factory], Factory]:
    """Says that a reward's factory imports `module`, which `pip install package` brings: asked for before the first
    round and not after the last."""

    def mark(factory: Factory) -> Factory:
        factory.needs = (*needed_by(factory), (module, package))  # type: ignore[attr-defined]
        return factory

    return mark


def needed_by(factory: Callable[..., Any]) -> tuple[tuple[str, str], ...]:
    """(module, package) of all that a factory says it imports."""
    return getattr(factory, "needs", ())


def need(module: str, package: str, reward: str) -> Any:
    """The module, or an error that says what to install for which reward."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidError(f"reward {reward} needs {module}; run: pip install {package}") from error
    except ImportError as error:  # a library of the system, as OpenCV's libGL
        raise InvalidError(f"reward {reward}: {module} is installed and cannot be loaded: {error}") from error
