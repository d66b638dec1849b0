"""The page of examples/serve in a browser: what it shows, what it says, and who can use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.chromium import Page, browser, find_chromium
from support.serving import Held, make_bank, picture, post, serving

from vpt_fast import PromptBank

UPLOAD = 100_000


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    find_chromium()
    return make_bank(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(bank: PromptBank) -> Iterator[httpx2.Client]:
    with serving(bank, max_upload_bytes=UPLOAD) as (client, _):
        yield client


@pytest.fixture(scope="module")
def shared_page(bank: PromptBank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(shared_page: Page, client: httpx2.Client) -> Page:
    shared_page.show(1200, 900)
    shared_page.events.clear()
    shared_page.open(str(client.base_url))
    shared_page.wait("document.querySelector('#task').options.length === 3")
    return shared_page


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(picture(0))
    return path


def text(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).innerText"))


def shown(page: Page) -> list[list[str]]:
    """Names and shares of the classes."""
    rows: list[list[str]] = page.run(
        "[...document.querySelectorAll('#classes li')].map(row =>"
        " [row.querySelector('.name').textContent, row.querySelector('.share').textContent])"
    )
    return rows


def settled(page: Page) -> None:
    page.wait("!document.querySelector('section').hasAttribute('aria-busy')")


def expected(client: httpx2.Client, task: str, topk: int = 5) -> list[list[str]]:
    classes = post(client, task, topk=topk).json()["classes"]
    return [[item["name"], share(item["probability"])] for item in classes]


def share(probability: float) -> str:
    return f"{100 * probability:.{3 if probability < 0.001 else 1}f} %"


def test_it_shows_what_the_server_answers(page: Page, client: httpx2.Client, image: Path) -> None:
    assert page.run("document.querySelector('#send').disabled")
    assert "3 classes, tuned with vpt-deep at 32 x 32 pixels." in text(page, "#about")
    assert "Up to 97.7 KiB and 25 megapixels: JPEG, PNG" in text(page, "#limits")
    page.choose_file("#image", image)
    page.wait("document.querySelectorAll('#classes li').length === 3")
    assert shown(page) == expected(client, "task-0")
    first = shown(page)[0]
    assert text(page, "#status") == f"task-0: most likely {first[0]}, {first[1]}"
    assert " ms from the upload to the answer, in a batch of its own." in text(page, "#cost")
    bars = page.run(
        "[...document.querySelectorAll('.bar')].map(bar => parseFloat(bar.style.width))"
    )
    assert bars == pytest.approx([float(row[1].rstrip(" %")) for row in shown(page)], abs=0.06)
    assert page.wait("!document.querySelector('#preview').hidden")
    assert text(page, "#prompt").startswith("image.png, ")

    page.run("task.value = 'task-1'; task.dispatchEvent(new Event('change')); topk.value = 2; 0")
    settled(page)
    page.run("document.querySelector('#send').click()")
    page.wait("document.querySelectorAll('#classes li').length === 2")
    assert shown(page) == expected(client, "task-1", 2)
    assert "4 classes, tuned with vapt" in text(page, "#about")


def test_an_image_can_be_dropped(page: Page, client: httpx2.Client) -> None:
    bytes_ = json.dumps(list(picture(0)))
    page.run(
        f"""(() => {{
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array({bytes_})], "dropped.png"));
            for (const kind of ["dragenter", "dragover", "drop"])
                drop.dispatchEvent(new DragEvent(kind, {{
                    dataTransfer: data, bubbles: true, cancelable: true }}));
        }})()"""
    )
    page.wait("document.querySelectorAll('#classes li').length === 3")
    assert shown(page) == expected(client, "task-0")
    assert text(page, "#prompt").startswith("dropped.png, ")
    assert not page.run("drop.classList.contains('over')")


def test_errors_are_told_in_words(page: Page, image: Path, tmp_path: Path) -> None:
    def complaint() -> str:
        settled(page)
        page.wait("!document.querySelector('#error').hidden")
        assert shown(page) == [] and text(page, "#status") == ""
        return text(page, "#error")

    def send() -> None:
        page.run("document.querySelector('#error').hidden = true")
        page.run("document.querySelector('#send').click()")

    (tmp_path / "notes.txt").write_text("not an image")
    page.choose_file("#image", tmp_path / "notes.txt")
    assert "The file is not an image of a format that the server takes" in complaint()
    assert page.run("document.querySelector('#preview').hidden")
    (tmp_path / "large.png").write_bytes(bytes(2 * UPLOAD))
    page.choose_file("#image", tmp_path / "large.png")
    page.wait("document.querySelector('#error').innerText.includes('KiB')")
    assert complaint() == (
        "The file has 195.3 KiB; the server takes up to 97.7 KiB. Choose a smaller one."
    )
    page.choose_file("#image", image)
    page.wait("document.querySelectorAll('#classes li').length === 3")
    assert page.run("document.querySelector('#error').hidden")
    page.run("topk.value = 0; 0")
    send()
    assert complaint() == "Classes to show must be a whole number, at least 1."
    page.run("topk.value = 1; task.options[0].value = 'gone'; 0")
    send()
    assert complaint() == "The server has no task 'gone'; GET /tasks lists them."
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.call("Network.emulateNetworkConditions", **offline)
    send()
    said = complaint()
    page.call("Network.emulateNetworkConditions", **{**offline, "offline": False})
    assert said.startswith("The server cannot be reached.")


def test_a_newer_request_takes_the_place_of_an_older_one(
    shared_page: Page, bank: PromptBank, image: Path
) -> None:
    held, page = Held(bank), shared_page
    with serving(held, max_wait=0.0) as (client, _):
        page.open(str(client.base_url))
        page.wait("document.querySelector('#task').options.length === 3")
        page.choose_file("#image", image)
        page.wait("document.querySelector('section').getAttribute('aria-busy') === 'true'")
        assert held.entered.wait(10)
        assert text(page, "#status") == "Classifying …"
        page.run("task.value = 'task-2'; task.dispatchEvent(new Event('change')); 0")
        held.go.set()
        page.wait("document.querySelectorAll('#classes li').length === 5")
        settled(page)
        assert text(page, "#status").startswith("task-2: ")


def test_it_can_be_used_by_keyboard_and_screen_reader(page: Page, image: Path) -> None:
    page.choose_file("#image", image)
    page.wait("document.querySelectorAll('#classes li').length === 3")
    order = []
    for _ in range(4):
        page.press("Tab", 9)
        order.append(page.run("document.activeElement.id"))
    assert order == ["task", "topk", "image", "send"]
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.run("results.replaceChildren()")
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('#classes li').length === 3")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            role, name = node["role"]["value"], node.get("name", {}).get("value", "")
            names.setdefault(role, []).append(name)
    assert names["combobox"] == ["Task"] and names["spinbutton"] == ["Classes to show"]
    assert names["heading"] == ["Classify an image", "Image", "Classes"]
    assert "Classify" in names["button"] and all(names["button"])
    assert names["image"] == ["Preview of image.png"]
    assert "status" in names and len(names["listitem"]) == 3
    assert page.run("document.documentElement.lang") == "en"


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
def test_it_fits_narrow_screens_and_is_legible(page: Page, image: Path, scheme: str) -> None:
    for width in (360, 1200):
        page.show(width, 800, scheme)
        page.choose_file("#image", image)
        page.wait("document.querySelectorAll('#classes li').length === 3")
        assert page.run("document.documentElement.scrollWidth") <= width
        inside = page.run(
            "[...document.querySelectorAll('main *')].every(node =>"
            f" node.getBoundingClientRect().right <= {width})"
        )
        assert inside
        targets = page.run(
            "[task, topk, drop, send].map(node => node.getBoundingClientRect().height)"
        )
        assert min(targets) >= 44
        # What was found comes into view.
        page.wait("document.querySelector('#cost').getBoundingClientRect().bottom <= 801")
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    page.run("complain('wrong')")
    contrast: dict[str, float] = page.run(CONTRAST)
    assert len(contrast) > 8 and min(contrast.values()) >= 4.5, contrast


def test_it_loads_nothing_from_elsewhere_and_logs_no_error(
    page: Page, client: httpx2.Client, image: Path
) -> None:
    page.choose_file("#image", image)
    page.wait("document.querySelectorAll('#classes li').length === 3")
    asked, wrong = _network_and_errors(page)
    own = str(client.base_url).rstrip("/")
    assert f"{own}/predict" in asked and f"{own}/static/page.js" in asked
    assert all(url.startswith((own, f"blob:{own}")) for url in asked), asked
    assert not wrong, wrong


def _network_and_errors(page: Page) -> tuple[list[str], list[Any]]:
    asked = [p["request"]["url"] for m, p in page.events if m == "Network.requestWillBeSent"]
    wrong = [
        p
        for m, p in page.events
        if m == "Runtime.exceptionThrown"
        or (m == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"))
        or (m == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"))
    ]
    return asked, wrong
