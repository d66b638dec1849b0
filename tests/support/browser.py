"""A headless Chromium for tests of pages: Playwright drives the one that is installed.

A test module says `pytest_plugins = ("support.browser",)` and asks for `browser` or `new_page`.
Without Playwright or without a Chromium its tests are skipped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MILLISECONDS = 60_000


def find_chromium(playwright: Playwright) -> str | None:
    """Return the path of a Chromium: the system's, or the one of `playwright install`."""
    own = playwright.chromium.executable_path
    found = (path for name in NAMES if (path := shutil.which(name)))
    return next(found, own if Path(own).is_file() else None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a browser, in which each test opens its own contexts."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.skip(
                f"no Chromium: looked for {', '.join(NAMES)}, and for Playwright's own "
                "(python -m playwright install chromium)"
            )
        expect.set_options(timeout=MILLISECONDS)
        # A proxy of the environment would not reach pages on localhost.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return a function that opens empty pages in contexts of their own."""
    contexts = []

    def new(width: int = 1200, height: int = 900, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            is_mobile=width < 600,
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        context.set_default_timeout(60_000)
        contexts.append(context)
        return context.new_page()

    yield new
    for context in contexts:
        context.close()


def open_page(page: Page, client: Any) -> Page:
    """Open the page of examples/serve, of a server with three tasks."""
    page.goto(str(client.base_url))
    expect(page.locator("#task option")).to_have_count(3)
    return page


def settled(page: Page) -> None:
    """Wait until that page waits for nothing."""
    expect(page.locator("section")).not_to_have_attribute("aria-busy", re.compile(""))
