"""Finds a reward by name (entry point) or by `module:function`, and checks what it answers."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from opd_core.api.types import Spec
from opd_core.errors import InvalidError, RefusedError
from torch import Tensor

from opd_trainer.rewards.packages import need, needed_by

GROUP = "diffusion_opd.rewards"

# images [N, 3, H, W] float32 in 0..1, N prompts, N mappings with the rest of each prompt's line -> [N] float32
RewardFn = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]


def load_reward(name: str, device: torch.device) -> RewardFn:
    """The reward `name`, ready to score on `device`. Its answers are checked for shape and finite numbers.

    Raises:
        InvalidError: unknown, or what it needs is not installed. RefusedError (when called): a wrong answer.
    """
    reward = find_reward(name)(device)

    def checked(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        scores = torch.as_tensor(reward(images, prompts, metadata)).detach().float().cpu()
        if scores.shape != (len(images),):
            raise RefusedError(
                f"reward {name} answered shape {tuple(scores.shape)} to {len(images)} images; it must be one each"
            )
        bad = torch.nonzero(~scores.isfinite()).flatten()
        if len(bad):
            raise RefusedError(f"reward {name} answered {scores[bad[0]]} for prompt {prompts[int(bad[0])]!r}")
        return scores

    return checked


def load_rewards(spec: Spec, device: str) -> dict[str, dict[str, RewardFn]]:
    """The rewards of every task, by name; two tasks with one reward share it.

    Raises:
        InvalidError: as `load_reward`.
    """
    names = dict.fromkeys(name for teacher in spec.teachers for name in teacher.rewards)
    loaded = {name: load_reward(name, torch.device(device)) for name in names}
    return {teacher.name: {name: loaded[name] for name in teacher.rewards} for teacher in spec.teachers}


def find_reward(name: str) -> Callable[[torch.device], RewardFn]:
    """The factory of the reward `name`, whose packages are here; its weights are not loaded.

    Raises:
        InvalidError: unknown, or a package of it cannot be imported.
    """
    factory = _imported(name) if ":" in name else _registered(name)
    for module, package in needed_by(factory):
        need(module, package, name)
    return factory


def _imported(name: str) -> Callable[[torch.device], RewardFn]:
    module, _, attribute = name.partition(":")
    try:
        factory: Callable[[torch.device], RewardFn] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidError(f"reward {name} cannot be imported: {error}; install its package beside this one") from error
    return factory


def _registered(name: str) -> Callable[[torch.device], RewardFn]:
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        known = ", ".join(sorted(registered)) or "none"
        raise InvalidError(
            f"there is no reward {name}; registered are {known}. Install the package that brings it (entry-point group "
            f"{GROUP}), or write module:function"
        )
    try:
        factory: Callable[[torch.device], RewardFn] = registered[name].load()
    except ImportError as error:
        raise InvalidError(f"reward {name} needs a package that is missing: {error}") from error
    return factory
