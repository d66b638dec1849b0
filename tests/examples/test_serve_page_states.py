"""What the page of examples/serve offers in each state, and the page of its interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect
from support.browser import open_page, settled
from support.serving import Held, make_bank, picture, serving

from vpt_fast import PromptBank

pytest_plugins = ("support.browser",)


@pytest.fixture(scope="module")
def bank(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    """Create a bank, only where there is a browser."""
    return make_bank(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(bank: PromptBank) -> Iterator[httpx2.Client]:
    with serving(bank) as (client, _):
        yield client


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(picture(0))
    return path


def test_a_button_is_shown_where_it_does_something(
    new_page: Callable[..., Page], bank: PromptBank, image: Path, tmp_path: Path
) -> None:
    held = Held(bank)
    with serving(held, max_wait=0.0) as (client, _):
        page = open_page(new_page(), client)
        send, error = page.locator("#send"), page.locator("#error")
        expect(send).to_be_hidden()
        page.set_input_files("#image", image)
        assert held.entered.wait(10)
        expect(send).to_be_hidden()
        held.go.set()
        settled(page)
        expect(send).to_be_hidden()
        page.fill("#topk", "2")
        expect(send).to_have_text("Classify")
        page.fill("#topk", "5")
        expect(send).to_be_hidden()
        held.failing.add("task-1")
        page.select_option("#task", "task-1")
        expect(error).to_be_visible()
        expect(send).to_have_text("Try again")
        held.failing.clear()
        send.click()
        settled(page)
        expect(error).to_be_hidden()
        expect(send).to_be_hidden()
        # The same file is refused again, so there is nothing to try.
        (tmp_path / "notes.txt").write_text("not an image")
        page.set_input_files("#image", tmp_path / "notes.txt")
        expect(error).to_be_visible()
        expect(send).to_be_hidden()


def test_one_task_is_not_to_be_chosen_and_none_has_no_form(
    new_page: Callable[..., Page], browser: Browser, tmp_path: Path
) -> None:
    bank = make_bank(tmp_path, tasks=1)
    with serving(bank) as (client, _):
        page = new_page()
        page.goto(str(client.base_url))
        expect(page.locator("#about")).to_contain_text("Task task-0: 3 classes")
        expect(page.locator("#task")).to_be_hidden()
        expect(page.locator("#how-many")).to_have_text("one task")
        bank.remove("task-0")
        page.reload()
        expect(page.locator("#error")).to_contain_text("The server has no tasks. Add an adapter")
        expect(page.locator("form")).to_be_hidden()


def test_small_shares_are_not_zero(new_page: Callable[..., Page], client: httpx2.Client) -> None:
    page = open_page(new_page(), client)
    shares = {0.0: "0.0%", 4.9e-5: "< 0.01%", 1e-4: "0.01%", 4.9e-4: "0.05%", 6e-4: "0.1%"}
    assert page.evaluate("values => values.map(percent)", list(shares)) == list(shares.values())


@pytest.mark.parametrize("width", [360, 1200])
def test_the_interface_loads_nothing_from_elsewhere(
    new_page: Callable[..., Page], client: httpx2.Client, width: int
) -> None:
    page, own = new_page(width), str(client.base_url).rstrip("/")
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((own, "data:")) else wrong.append(request.url)
        ),
    )
    page.goto(f"{own}/")
    page.get_by_role("link", name="the interface").click()
    for path in ("/predict", "/tasks", "/health", "/metrics"):
        expect(page.locator(f".opblock [data-path='{path}']")).to_be_visible()
    page.locator(".opblock [data-path='/tasks']").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text("task-0")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong, wrong
