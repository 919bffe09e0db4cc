"""A real Chromium that sees a page of ours."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright


@contextmanager
def browsing() -> Iterator[tuple[Page, list[str]]]:
    """An empty page, and a list of what is wrong with those it shows: errors, what a policy forbade, what did not load."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium here: tools/devcluster/build.sh browser"
    with sync_playwright() as playwright:
        # Without its sandbox, which Chromium refuses to root; the pages are ours.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page, wrong = browser.new_page(), []
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda line: wrong.append(f"console: {line.text}") if line.type == "error" else None)
        page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
        yield page, wrong
        browser.close()
