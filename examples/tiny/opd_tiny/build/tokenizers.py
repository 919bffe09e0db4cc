"""The two tokenizers of the tiny world, over its twenty-odd words, in the formats Stable Diffusion 3 expects."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from ..scenes import COLOURS

TOKENS = 10
"""Tokens per text encoder, begin and end marks included; the longest prompt needs all of them."""

_WORDS = ["a", "above", "below", "left", "right", "of", "two", "three", "the", "number", "lovely", "picture", *COLOURS]
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
