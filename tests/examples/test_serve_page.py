"""The page of examples/serve in a browser: its results, errors, layout and accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect
from support.browser import open_page, settled
from support.serving import Held, make_bank, picture, post, serving

from vpt_fast import PromptBank

pytest_plugins = ("support.browser",)

UPLOAD = 100_000


@pytest.fixture(scope="module")
def bank(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    """Create a bank, only where there is a browser."""
    return make_bank(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(bank: PromptBank) -> Iterator[httpx2.Client]:
    with serving(bank, max_upload_bytes=UPLOAD) as (client, _):
        yield client


@pytest.fixture
def page(new_page: Callable[..., Page], client: httpx2.Client) -> Page:
    return open_page(new_page(), client)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(picture(0))
    return path


def classify(page: Page, image: Path, classes: int = 3) -> None:
    page.set_input_files("#image", image)
    expect(page.locator("#classes li")).to_have_count(classes)


def shown(page: Page) -> list[list[str]]:
    """Return the shown names and shares of the classes."""
    names = page.locator("#classes .name").all_text_contents()
    shares = page.locator("#classes .share").all_text_contents()
    return [list(row) for row in zip(names, shares, strict=True)]


def expected(client: httpx2.Client, task: str, topk: int = 5) -> list[list[str]]:
    classes = post(client, task, topk=topk).json()["classes"]
    return [[item["name"], share(item["probability"])] for item in classes]


def share(probability: float) -> str:
    if 0 < probability < 0.00005:
        return "< 0.01%"
    return f"{100 * probability:.{2 if 0 < probability < 0.0005 else 1}f}%"


def test_it_shows_the_answer_of_the_server(page: Page, client: httpx2.Client, image: Path) -> None:
    expect(page.locator("#send")).to_be_hidden()
    about = page.locator("#about")
    expect(about).to_contain_text("3 classes, tuned with vpt-deep at 32 x 32 pixels.")
    expect(page.locator("#status")).to_have_text(
        "Choose an image to see what the model takes it for."
    )
    limits = "Up to 97.7 KiB and 25 megapixels: JPEG, PNG"
    expect(page.locator("#limits")).to_contain_text(limits)
    classify(page, image)
    assert shown(page) == expected(client, "task-0")
    first = shown(page)[0]
    expect(page.locator("#status")).to_have_text(f"task-0: most likely {first[0]}, {first[1]}")
    cost = " ms from the upload to the answer, in a batch of its own."
    expect(page.locator("#cost")).to_contain_text(cost)
    bars = page.evaluate(
        "[...document.querySelectorAll('.bar')].map(bar => parseFloat(bar.style.width))"
    )
    assert bars == pytest.approx([float(row[1].rstrip("%")) for row in shown(page)], abs=0.06)
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#prompt")).to_contain_text("image.png, ")

    page.select_option("#task", "task-1")
    page.fill("#topk", "2")
    settled(page)
    page.click("#send")
    expect(page.locator("#classes li")).to_have_count(2)
    assert shown(page) == expected(client, "task-1", 2)
    expect(about).to_contain_text("4 classes, tuned with vapt")


def test_an_image_can_be_dropped(page: Page, client: httpx2.Client) -> None:
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
            for (const kind of ["dragenter", "dragover", "drop"])
                drop.dispatchEvent(new DragEvent(kind, {
                    dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(picture(0)),
    )
    expect(page.locator("#classes li")).to_have_count(3)
    assert shown(page) == expected(client, "task-0")
    expect(page.locator("#prompt")).to_contain_text("dropped.png, ")
    expect(page.locator("#drop")).not_to_have_class(re.compile(r"\bover\b"))


def test_errors_are_shown_as_text(page: Page, image: Path, tmp_path: Path) -> None:
    error = page.locator("#error")

    def complains(text: str) -> None:
        settled(page)
        expect(error).to_be_visible()
        expect(error).to_contain_text(text)
        assert shown(page) == []
        expect(page.locator("#status")).to_be_empty()

    def send() -> None:
        page.evaluate("document.querySelector('#error').hidden = true")
        page.click("#send")

    (tmp_path / "notes.txt").write_text("not an image")
    page.set_input_files("#image", tmp_path / "notes.txt")
    complains("The file is not an image of a format that the server takes")
    expect(page.locator("#preview")).to_be_hidden()
    (tmp_path / "large.png").write_bytes(bytes(2 * UPLOAD))
    page.set_input_files("#image", tmp_path / "large.png")
    complains("The file has 195.3 KiB; the server takes up to 97.7 KiB. Choose a smaller one.")
    classify(page, image)
    expect(error).to_be_hidden()
    page.fill("#topk", "0")
    send()
    complains("Classes to show must be a whole number, at least 1.")
    page.fill("#topk", "1")
    page.evaluate("task.options[0].value = 'gone'")
    send()
    complains("The server has no task 'gone'; GET /tasks lists them.")
    page.context.set_offline(True)
    send()
    complains("The server cannot be reached.")


def test_a_newer_request_replaces_an_older_one(
    new_page: Callable[..., Page], bank: PromptBank, image: Path
) -> None:
    held = Held(bank)
    with serving(held, max_wait=0.0) as (client, _):
        page = open_page(new_page(), client)
        page.set_input_files("#image", image)
        expect(page.locator("section")).to_have_attribute("aria-busy", "true")
        assert held.entered.wait(10)
        expect(page.locator("#status")).to_have_text("Classifying …")
        page.select_option("#task", "task-2")
        held.go.set()
        expect(page.locator("#classes li")).to_have_count(5)
        settled(page)
        expect(page.locator("#status")).to_contain_text("task-2: ")


def test_it_can_be_used_by_keyboard_and_screen_reader(page: Page, image: Path) -> None:
    classify(page, image)
    page.evaluate("topk.value = 2; topk.dispatchEvent(new Event('input'))")
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["task", "topk", "image", "send"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#classes li")).to_have_count(2)
    expect(page.locator("#send")).to_be_hidden()
    page.fill("#topk", "3")
    page.click("#send")
    expect(page.locator("#classes li")).to_have_count(3)
    page.fill("#topk", "2")
    names: dict[str, list[str]] = {}
    for line in page.locator("body").aria_snapshot().splitlines():
        if found := re.match(r'- (\w+)(?: "(.*?)")?', line.strip()):
            names.setdefault(found[1], []).append(found[2] or "")
    assert names["combobox"] == ["Task"] and names["spinbutton"] == ["Classes to show"]
    assert names["heading"] == ["Classify an image", "Image", "Classes"]
    assert "Classify" in names["button"] and all(names["button"])
    assert names["img"] == ["Preview of image.png"]
    assert "status" in names and len(names["listitem"]) == 3
    expect(page.locator("html")).to_have_attribute("lang", "en")


CONTRAST = """(() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
    }
  };
  const found = {};
  for (const node of document.querySelectorAll("h1, h2, p, label, strong, button, select, input, li span")) {
    if (!node.innerText && !node.value) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    found[node.tagName + "#" + node.id + "." + node.className] =
      (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
})()"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_screens_and_is_legible(
    new_page: Callable[..., Page], client: httpx2.Client, image: Path, scheme: str
) -> None:
    for width in (360, 1200):
        page = open_page(new_page(width, 800, scheme), client)
        classify(page, image)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            """width => [...document.querySelectorAll("main *")].every(
                node => node.getBoundingClientRect().right <= width)""",
            width,
        )
        # The result scrolls into view.
        page.wait_for_function("element('cost').getBoundingClientRect().bottom <= 801")
        page.fill("#topk", "2")
        targets = page.evaluate(
            "[task, topk, drop, send].map(node => node.getBoundingClientRect().height)"
        )
        assert min(targets) >= 44
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    page.evaluate("complain('wrong')")
    contrast: dict[str, float] = page.evaluate(CONTRAST)
    assert len(contrast) > 8 and min(contrast.values()) >= 4.5, contrast


def test_it_loads_nothing_from_elsewhere_and_logs_no_error(
    new_page: Callable[..., Page], client: httpx2.Client, image: Path
) -> None:
    page = new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text) if message.type in ("error", "warning", "assert") else None
        ),
    )
    classify(open_page(page, client), image)
    own = str(client.base_url).rstrip("/")
    assert f"{own}/predict" in asked and f"{own}/static/page.js" in asked
    assert all(url.startswith((own, f"blob:{own}")) for url in asked), asked
    assert not wrong, wrong
    # The log would have recorded an error.
    with page.expect_console_message(lambda message: message.type == "error"):
        page.evaluate("fetch('nowhere').then(() => 0)")
    assert "404" in wrong[0]
