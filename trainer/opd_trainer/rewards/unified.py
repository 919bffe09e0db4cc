"""UnifiedReward (Wang et al. 2025, arXiv 2503.05236): a vision-language model gives an image 1 to 5 for its prompt.

It lives behind a server with OpenAI's API (sglang, vLLM), which `spec.rewardServers` names; nothing of it runs here.
"""

import json
import os
import re
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from opd_core.api.types import RewardServers
from torch import Tensor
from torch.nn import functional

from opd_trainer.rewards.remote import about, in_batches
from opd_trainer.rewards.replicas import Replicas
from opd_trainer.rewards.wire import Question, data_url, printable

if TYPE_CHECKING:
    from opd_trainer.rewards.registry import RewardFn

NAME = "unified-reward"
MODEL, PROMPT, KEY = "OPD_UNIFIED_REWARD_MODEL", "OPD_UNIFIED_REWARD_PROMPT", "OPENAI_API_KEY"  # of the environment
_MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"
# Not the authors' words: with theirs in $OPD_UNIFIED_REWARD_PROMPT its scores can be compared with published ones.
_PROMPT = """Somebody asked for an image with these words: {prompt}
Say in a few sentences how much of this the image shows, what is wrong or missing, and how well it is made.
Then end with a line "Final Score: X", where X is a number from 1, for none of it, to 5, for all of it with no flaw."""
_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
_LONGEST_SIDE = 512  # pixels
_LONGEST_ANSWER = 1024  # tokens
_AT_ONCE = 16  # images that each server is asked for; it makes batches of them itself


def unified_reward(servers: RewardServers, tries: int, hurry: threading.Event) -> "RewardFn":
    """1 to 5 for each image, at temperature 0.

    Raises (when called):
        UnavailableError: no server answers within its tries. RefusedError: a refusal, or an answer without a score.
    """
    replicas = Replicas(servers.urls, servers.timeout_seconds, hurry)
    return in_batches(NAME, partial(_ask, replicas, tries), 1, _AT_ONCE * len(replicas))


def _ask(replicas: Replicas, tries: int, question: Question, *, stop: threading.Event) -> Tensor:
    text = os.environ.get(PROMPT, _PROMPT).replace("{prompt}", question.prompts[0])
    content = [
        {"type": "image_url", "image_url": {"url": data_url(_smaller(question.images))}},
        {"type": "text", "text": text},
    ]
    asked = {
        "model": os.environ.get(MODEL, _MODEL),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": _LONGEST_ANSWER,
    }
    headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if KEY in os.environ else {}
    body = json.dumps(asked).encode()
    return replicas.ask(
        "/chat/completions", body, _read_score, about(question), headers=headers, stop=stop, tries=tries
    )


def _read_score(content: bytes) -> Tensor:
    """[1]. Raises ValueError: there is none."""
    try:
        answer: Any = json.loads(content)
        said = answer["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError("it is no chat completion") from error
    match = _SCORE.search(said) if isinstance(said, str) else None
    if match is None or float(match[1]) > 5:
        raise ValueError(f'no "Final Score:" of 1 to 5 in it, but {printable(repr(said))}')
    return torch.tensor([float(match[1])])


def _smaller(image: Tensor) -> Tensor:
    """[1, 3, H, W] with at most `_LONGEST_SIDE` pixels a side."""
    scale = min(1.0, _LONGEST_SIDE / max(image.shape[-2:]))
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return functional.interpolate(image.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
