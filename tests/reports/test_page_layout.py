"""The page of `vpt-fast report` in a browser: frames, captions, titles, narrow and dark screens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Page
from support.pictures import make_folders, write_checkpoint, write_image
from test_page import call, train

from vpt_fast.reports.page.page import page_title
from vpt_fast.train.sweep.report import HEADER

pytest_plugins = ("support.browser",)

CLASSES = ("red", "a_class_with_a_very_long_name_that_does_not_fit_above_a_column", "blue")


@pytest.fixture(scope="module")
def report(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a page about a run of VAPT, whose maps all stay 0, and a sweep."""
    root = tmp_path_factory.mktemp("layout")
    data = make_folders(root / "data", CLASSES, train=4, val=2, test=3)
    for label, name in enumerate(CLASSES):  # colours of another class: mistakes
        write_image(data / "test" / name / "odd.png", (label + 1) % 3, 5)
    train(data, write_checkpoint(root / "tiny.pth"), root / "run", "--method", "vapt", "--lr", 0)
    rows = [
        (name, 1, 0, 5, 90, seed, top1, 0.1234567891, 5000, 800, 2)
        for name in ("linear", "vapt")
        for seed, top1 in ((1, 80), (2, 246 / 3.1))
    ]
    (root / "sweep").mkdir()
    lines = "\n".join(",".join(map(str, row)) for row in (HEADER, *rows))
    (root / "sweep" / "sweep.csv").write_text(lines)
    result = call("report", root / "run", root / "sweep", "--output", root / "page.html")
    assert result.exit_code == 0, result.output
    return root


def opened(page: Page, report: Path) -> Page:
    page.goto(f"file://{report}/page.html")
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_frames_fit_and_nothing_leaves_the_page(
    new_page: Callable[..., Page], report: Path, width: int, scheme: str
) -> None:
    page = opened(new_page(width, 800, scheme), report)
    assert page.title() == f"run, sweep in {report.name} - vpt-fast report"
    assert page.locator("h1").text_content() == f"run, sweep in {report.name}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """[...document.querySelectorAll('.box')].map(box => [box.clientWidth,
            box.firstElementChild.offsetWidth, box.parentElement.clientWidth - 2])"""
    )
    assert len(boxes) >= 7
    for inside, table, room in boxes:
        assert inside == pytest.approx(min(table, room), abs=1.5)
    captions = page.evaluate(
        """[...document.querySelectorAll('figcaption')].map(
            node => [node.getBoundingClientRect().right, node.scrollWidth - node.clientWidth])"""
    )
    assert len(captions) >= 4
    assert all(right <= width and hidden <= 0 for right, hidden in captions)
    images = page.evaluate(
        """[...document.querySelectorAll('.mistakes img')].map(image =>
            image.clientWidth / image.clientHeight / image.naturalWidth * image.naturalHeight)"""
    )
    assert images and images == pytest.approx([1.0] * len(images), abs=0.02)
    cut = page.evaluate(
        """[...document.querySelectorAll('.matrix thead span')].map(node => Math.max(
            node.scrollHeight - node.clientHeight, node.scrollWidth - node.clientWidth))"""
    )
    assert max(cut) <= 1
    sizes = page.evaluate(
        """[...document.querySelectorAll('svg text')].map(node => node.getBBox().height *
            node.ownerSVGElement.clientWidth / node.ownerSVGElement.viewBox.baseVal.width)"""
    )
    assert min(sizes) >= 9


def test_the_sweep_is_drawn_in_the_colours_of_the_page(
    new_page: Callable[..., Page], report: Path
) -> None:
    page = opened(new_page(scheme="dark"), report)
    ink = page.evaluate("getComputedStyle(document.body).color")
    colours = page.evaluate(
        """[...document.querySelectorAll('.sweep svg text')].filter(
            node => node.textContent == 'linear').map(node => getComputedStyle(node).fill)"""
    )
    assert colours == [ink]
    text = page.locator(".sweep").text_content() or ""
    assert "5,000 trained" in text and "79.68 ± 0.46" in text
    table = page.locator("[aria-label='Final runs of sweep sweep']").text_content() or ""
    assert "79.3548" in table and "79.35483" not in table and "0.123457" in table


def test_equal_experts_are_said(new_page: Callable[..., Page], report: Path) -> None:
    page = opened(new_page(), report)
    text = page.locator("main").text_content() or ""
    assert "Prompts with equal token mixing maps (to 2% of the block's largest weight)" in text
    assert "blocks 1-5: prompts 0-9 the same" in text


def test_titles_of_many_runs_are_short() -> None:
    def folders(*paths: str) -> list[tuple[Path, str]]:
        return [(Path(path), Path(path).name) for path in paths]

    assert page_title(folders("/a/out/run")) == "run in out"
    assert page_title(folders("/a/x/one", "/a/y/two")) == "one, two"
    assert page_title(folders(*(f"/a/out/{i}" for i in range(5)))) == "0, 1, 2 and 2 more in out"
