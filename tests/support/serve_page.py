"""The page of examples/serve in a browser, for tests of it."""

from __future__ import annotations

import re

import httpx2
from playwright.sync_api import Page, expect


def open_page(page: Page, client: httpx2.Client) -> Page:
    page.goto(str(client.base_url))
    expect(page.locator("#task option")).to_have_count(3)
    return page


def settled(page: Page) -> None:
    expect(page.locator("section")).not_to_have_attribute("aria-busy", re.compile(""))
