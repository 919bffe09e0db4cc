"""What stands between the operator and the API server: its clock, and answers that are none."""

import email.utils
import time

import pytest
from opd_operator import kube


def date(ahead: float) -> str:
    return (
        email.utils.format_datetime(email.utils.localtime())
        if ahead == 0
        else email.utils.formatdate(time.time() + ahead)
    )


@pytest.mark.parametrize("ahead", [0, 3, -3])
def test_a_few_seconds_are_no_other_clock(ahead: float) -> None:
    assert kube._ahead(date(ahead), 0.0) == 0.0


@pytest.mark.parametrize("ahead", [60, -60, 7200])
def test_another_clock_is_followed_and_left_again(ahead: float) -> None:
    found = kube._ahead(date(ahead), 0.0)
    assert abs(found - ahead) < 2
    assert kube._ahead(date(0), found) == 0.0


def test_a_clock_does_not_jump_between_two_answers() -> None:
    """A header has whole seconds: at 5.5 s the difference is above and below any bound, answer by answer."""
    known, jumps = 0.0, 0
    for fraction in range(40):
        found = kube._ahead(date(4.6 + 1.4 * (fraction % 2)), known)
        jumps, known = jumps + (found != known), found
    assert jumps <= 1


@pytest.mark.parametrize(
    "header",
    ["", "soon", "Mon, 99 Jan 2026 00:00:00 GMT", "9" * 5000, "Mon, 01 Jan 9999 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT",
     "Mon, 01 Jan 0001 00:00:00 +2359", "\ud800"],
)  # fmt: skip
def test_a_date_that_is_none_changes_nothing(header: str) -> None:
    """Nor one of a proxy that answers from its memory: a year ahead every deadline would have passed."""
    assert kube._ahead(header, 42.0) == 42.0


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[" * 100_000, b"9" * 100_000, b"[1]", b'{"details": 7}', b"\xff\xfe"]
)
def test_an_answer_that_is_no_status_is_an_error_all_the_same(body: bytes) -> None:
    error = kube._error(502, "", body)
    assert (error.status, error.causes, error.retry_after) == (502, (), 0.0)


@pytest.mark.parametrize(
    ("header", "pause"), [("3", 3.0), ("9" * 5000, 300.0), ("-1", 0.0), ("nan", 0.0), ("1e9", 0.0)]
)
def test_nobody_makes_the_operator_wait_for_ever(header: str, pause: float) -> None:
    assert kube._error(429, header, b"{}").retry_after == pause
