"""Finds a reward by name, and checks what it answers."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from opd_core.api.types import RewardServers, Spec
from opd_core.errors import InvalidError, RefusedError
from opd_core.plugins import find_plugin
from torch import Tensor

from opd_trainer.rewards.packages import need, needed_by
from opd_trainer.rewards.remote import remote_reward
from opd_trainer.rewards.replicas import TRIES
from opd_trainer.rewards.unified import NAME as UNIFIED
from opd_trainer.rewards.unified import unified_reward

# images [N, 3, H, W] float32 in 0..1, N prompts, N mappings with the rest of each prompt's line -> [N] float32
RewardFn = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]

FRAMES = 8  # of a video that a reward sees, at most


def load_reward(
    name: str,
    device: torch.device,
    servers: RewardServers | None = None,
    *,
    tries: int = TRIES,
    hurry: threading.Event | None = None,
) -> RewardFn:
    """The reward `name`, ready to score on `device` or by `servers`, from any thread. Its answers are checked for shape
    and finite numbers. Of videos [N, F, 3, H, W] it gives the mean over frames.

    Args:
        tries: of each question to `servers`. hurry: once it is set, they are not asked again.

    Raises:
        InvalidError: unknown, or what it needs is not installed. RefusedError (when called): a wrong answer.
        UnavailableError (when called): no server answers.
    """
    if servers is not None:
        make = unified_reward if name == UNIFIED else remote_reward
        return over_frames(_checked(name, make(servers, tries, hurry or threading.Event())))
    reward, alone = find_reward(name)(device), threading.Lock()  # tokenisers and pipelines are of one thread at a time

    def one_at_a_time(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        with alone:
            return reward(images, prompts, metadata)

    return over_frames(_checked(name, one_at_a_time))


def over_frames(reward: RewardFn) -> RewardFn:
    """A reward of images that scores videos [N, F, 3, H, W], too: the mean over eight frames from the first to the
    last, evenly spread, or over all where there are fewer."""

    def of_both(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        if images.ndim == 4:
            return reward(images, prompts, metadata)
        count = min(FRAMES, images.shape[1])
        chosen = images[:, torch.linspace(0, images.shape[1] - 1, count).round().long()]
        scores = reward(
            chosen.flatten(0, 1),
            [prompt for prompt in prompts for _ in range(count)],
            [of_video for of_video in metadata for _ in range(count)],
        )
        return scores.view(-1, count).mean(1)

    return of_both


def _checked(name: str, reward: RewardFn) -> RewardFn:
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


def load_rewards(spec: Spec, device: str, hurry: threading.Event | None = None) -> dict[str, dict[str, RewardFn]]:
    """The rewards of every task, by name; two tasks with one reward share it. `hurry`: as `load_reward`.

    Raises:
        InvalidError: as `load_reward`.
    """
    names = dict.fromkeys(name for teacher in spec.teachers for name in teacher.rewards)
    served = {servers.reward: servers for servers in spec.reward_servers}
    loaded = {name: load_reward(name, torch.device(device), served.get(name), hurry=hurry) for name in names}
    return {teacher.name: {name: loaded[name] for name in teacher.rewards} for teacher in spec.teachers}


def find_reward(name: str) -> Callable[[torch.device], RewardFn]:
    """The factory of the reward `name`, whose packages are here; its weights are not loaded.

    Raises:
        InvalidError: unknown, only to be had from servers, or a package of it cannot be imported.
    """
    if name == UNIFIED:
        raise InvalidError(
            f"reward {UNIFIED} is a model behind OpenAI's API; name its servers in spec.rewardServers, as {{reward: "
            f'{UNIFIED}, urls: ["http://sglang:30000/v1"]}}'
        )
    factory: Callable[[torch.device], RewardFn] = find_plugin("reward", name)
    for module, package in needed_by(factory):
        need(module, package, name)
    return factory
