"""Last words and pod statuses of whoever wrote them: what is ours is read, the rest is text, and none of it is trusted."""

import json
from typing import Any

import pytest
from opd_operator import names
from opd_operator.observe import observe
from opd_operator.words import Facts, Words, printable, words

DIGEST = "sha256:" + "a" * 64


def last_words(message: str, **more: Any) -> Words:
    ended = {"exitCode": 1, "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z", "message": message, **more}
    found = words([{"name": "trainer", "state": {"terminated": ended}}])
    assert found is not None
    return found


def said(**facts: Any) -> Words:
    return last_words(json.dumps(facts))


def test_what_our_programs_say_is_read() -> None:
    score = {"task": "ocr", "reward": "tiny-ocr", "student": 0.5}
    found = said(message="done", exitCode=75, digest=DIGEST, gatePassed=True, scores=[score])
    assert (found.message, found.facts.exit_code, found.facts.digest) == ("done", 75, DIGEST)
    assert found.facts.scores[0].student == 0.5


@pytest.mark.parametrize(
    "message",
    [
        "[" * 4096, '{"a":' * 800, "9" * 4096, '{"exitCode":' + "9" * 4000 + "}", "\ud800", '{"message": "\\ud800"}',
        "NaN", "", "null", '"text"', "[1, 2]", "\x00", '{"message": 7}',
    ],
)  # fmt: skip
def test_any_other_last_words_are_a_text(message: str) -> None:
    """The first of them once ended the operator for every namespace."""
    found = last_words(message)
    assert found.facts == Facts()
    assert found.message == printable(message).strip()


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": "sha256:x\n"}, {"exitCode": 2**40}, {"gatePassed": "perhaps"},
        {"scores": [{"task": "a", "reward": "b", "student": 10**400}]},
        {"scores": [{"task": "a\x1b[2J", "reward": "b"}]}, {"scores": [{"task": "a" * 300, "reward": "b"}]},
    ],
)  # fmt: skip
def test_of_words_that_are_ours_in_part_only_the_text_is_told(wrong: dict[str, Any]) -> None:
    found = last_words(json.dumps({"message": "it broke", **wrong}))
    assert found.message == "it broke"
    assert found.facts == Facts(message="it broke")


def test_no_more_is_read_than_the_kubelet_keeps() -> None:
    assert len(last_words("x" * 1_000_000).message) == 4096


@pytest.mark.parametrize("index", ["9" * 5000, "-1", "", "1.5", "0x1", "\u0663" * 11])
def test_an_index_that_is_none_is_the_first(index: str) -> None:
    pod = {"kind": "Pod", "metadata": {"name": "p", "annotations": {names.COMPLETION_INDEX: index}}}
    assert observe([pod]).pods[0].index == 0


# --------------------------------------------------------------------------------------------- what reaches a terminal


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines\tand a tab", "\u00e4\u00f6 \u4e2d\u6587 \u00a0\u3000 \U0001f600", ""]
)
def test_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "steering", ["\x1b", "\x9b", "\x07", "\x08", "\r", "\x00", "\x7f", "\u202e", "\u2066", "\u200b", "\u2028", "\ud800"]
)
def test_what_steers_a_terminal_or_hides_is_replaced(steering: str) -> None:
    assert printable(f"a{steering}b\n") == "a\ufffdb\n"
    assert last_words(f"a{steering}b", reason=f"c{steering}d").message == "a\ufffdb"
    assert last_words("", reason=f"c{steering}d").reason == "c\ufffdd"
    if steering != "\ud800":  # which no JSON has
        assert said(message=f"a{steering}b").message == "a\ufffdb"
