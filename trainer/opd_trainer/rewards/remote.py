"""A reward that servers compute, for what is too heavy, or too foreign, to live in the trainer."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from opd_core.api.types import RewardServers
from torch import Tensor

from opd_trainer.rewards.replicas import Replicas
from opd_trainer.rewards.wire import Question, read_scores, write_question

if TYPE_CHECKING:
    from opd_trainer.rewards.registry import RewardFn

_BATCH = 16  # images of a question, at most
_BATCH_PIXELS = 2**23
_AT_ONCE = 2  # questions to each server: one is on its way while the other is computed


class Ask(Protocol):
    """Scores of the images of one question; whoever sets `stop` does not want them any more."""

    def __call__(self, question: Question, *, stop: threading.Event) -> Tensor: ...


def remote_reward(servers: RewardServers, tries: int, hurry: threading.Event) -> "RewardFn":
    """The reward of this name as its servers compute it, from images of 8 bits a colour.

    Raises (when called):
        UnavailableError: no server answers within its tries. RefusedError: a wrong answer, or a refusal.
    """
    replicas = Replicas(servers.urls, servers.timeout_seconds, hurry)

    def ask(question: Question, *, stop: threading.Event) -> Tensor:
        read = partial(read_scores, count=len(question.images))
        return replicas.ask("/score", write_question(question), read, about(question), stop=stop, tries=tries)

    return in_batches(servers.reward, ask, _BATCH, _AT_ONCE * len(replicas))


def in_batches(name: str, ask: Ask, most: int, at_once: int) -> "RewardFn":
    """A reward that asks for `most` images at a time, `at_once` of such questions side by side; the first that fails
    ends them all."""

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        if len(images) == 0:
            return torch.zeros(0)
        size = max(1, min(most, _BATCH_PIXELS // (images.shape[-2] * images.shape[-1])))
        questions = [
            Question(name, images[i : i + size], prompts[i : i + size], metadata[i : i + size])
            for i in range(0, len(images), size)
        ]
        stop = threading.Event()
        with ThreadPoolExecutor(min(at_once, len(questions)), thread_name_prefix=f"reward-{name}") as pool:
            answers = [pool.submit(ask, question, stop=stop) for question in questions]
            try:
                done, _ = wait(answers, return_when=FIRST_EXCEPTION)
                for answer in done:
                    answer.result()  # raises what has failed
                return torch.cat([answer.result() for answer in answers])
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    return reward


def about(question: Question) -> str:
    """For messages."""
    count, prompt = len(question.images), question.prompts[0]
    images = f"the image of {prompt!r}" if count == 1 else f"{count} images, the first of {prompt!r}"
    return f"reward {question.reward}, {images}"
