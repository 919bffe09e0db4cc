"""The playground, as a person uses it: a real browser types into it."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from opd_serving.endpoint.server import Settings, make_service
from playwright.sync_api import Page, expect

from tests.browser import browsing

from .conftest import Endpoint, running

KEY = "a-key-of-at-least-sixteen"


@pytest.fixture(scope="module")
def locked(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint that wants a key."""
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} ours\n")
    with running(make_service(replace(settings, api_keys=keys))) as started:
        yield started


@pytest.fixture
def playground(locked: Endpoint) -> Iterator[tuple[Page, list[str]]]:
    with browsing() as (page, wrong):
        page.goto(locked.url)
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        yield page, wrong


def test_an_image_comes_as_its_fields_say(playground: tuple[Page, list[str]]) -> None:
    page, wrong = playground
    for label, text in (("Seed", "7"), ("Size", "32x32"), ("Steps", "2"), ("Guidance", "3")):
        page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("img", name="a red circle")).to_be_visible(timeout=60_000)
    expect(page.locator("figcaption")).to_contain_text("seed 7, 32x32, 2 steps, guidance 3, tiny")
    assert page.evaluate("document.images[0].naturalWidth") == 32
    assert not wrong


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [("Size", "33x32", "size"), ("Steps", "many", "steps"), ("API key", "another", "API key")],
)
def test_what_the_server_refuses_is_told_and_the_form_stays(
    playground: tuple[Page, list[str]], label: str, text: str, said: str
) -> None:
    page, _ = playground
    page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text(said, timeout=60_000)
    expect(page.locator("figure")).to_be_hidden()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
