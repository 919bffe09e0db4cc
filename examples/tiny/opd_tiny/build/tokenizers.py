"""The tokenizers of the tiny worlds, over their twenty-odd words, in the formats that the families expect."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from ..scenes import COLOURS

TOKENS = 10
"""Tokens per text encoder of Stable Diffusion 3, begin and end marks included; the longest prompt needs all of them."""

_WORDS = ["a", "above", "below", "left", "right", "of", "two", "three", "the", "number", "lovely", "picture", *COLOURS]
# Of a chat, which Qwen's text models expect around a prompt: twelve tokens.
_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
_CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer with every word of the prompts as one token.

    The merges are trained: merges chained by hand collide (``re`` + ``d`` keeps ``gre`` + ``en`` from forming).
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(_WORDS)] * 4, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = ["<|startoftext|>", "<|endoftext|>", *_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    pieces += dict.fromkeys(a + b for a, b in merges if a + b not in set(pieces))
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer whose scores prefer whole words to characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
    pieces += [("▁" + w, -2.0) for w in _WORDS]
    pieces += [(c, -6.0) for c in _CHARACTERS]
    pieces += [("▁" + c, -5.0) for c in string.digits + '"']
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of bytes that has every word of the prompts and of the chat around them as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([w for word in ["user", "assistant", "\n\n", *_WORDS] for w in (word, f" {word}")], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*_MARKS, *alphabet, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS[1:]})
    tokenizer.chat_template = _CHAT
    return tokenizer
