"""Optional packages of rewards, and the message when one is missing."""

import importlib
from typing import Any

from opd_core.errors import InvalidError


def need(module: str, package: str, reward: str) -> Any:
    """The module, or an error that says what to install for which reward."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidError(f"reward {reward} needs {module}; run: pip install {package}") from error
    except ImportError as error:  # a library of the system, as OpenCV's libGL
        raise InvalidError(f"reward {reward}: {module} is installed and cannot be loaded: {error}") from error
