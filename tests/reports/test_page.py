"""The page of `vpt-fast report`: its figures, escaping, and notes on missing images."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import make_folders, write_checkpoint, write_image
from typer.testing import CliRunner

from vpt_fast.cli.app import app
from vpt_fast.reports.page.classes import (
    class_rows,
    count_confusions,
    frequent_confusions,
    shown_matrix,
)
from vpt_fast.reports.page.evaluation import EvaluationOptions, evaluate_run
from vpt_fast.reports.page.experts import expert_use
from vpt_fast.reports.page.mistakes import worst_mistakes
from vpt_fast.reports.page.runs import read_runs
from vpt_fast.train.sweep.report import HEADER

CLASSES = ("<script>alert(1)<", "a & b", '"red"')


class Reader(HTMLParser):
    """A parser that collects a page's elements, ids and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.heads: list[dict[str, Any]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.images += [values] if tag == "img" else []
        self.heads += [values] if tag == "th" else []


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(data: Path, weights: Path, output: Path, *options: Any) -> None:
    model = ["--model", "test_vit", "--img-size", "32", "--checkpoint", weights]
    result = call("train", data, *model, "-b", 8, "--epochs", 2, "--output", output, *options)
    assert result.exit_code in (0, 1), result.output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create data/ with class names to escape and a damaged test image, and two runs on it."""
    root = tmp_path_factory.mktemp("page")
    data = make_folders(root / "data", CLASSES, train=4, val=2, test=3)
    for label, name in enumerate(CLASSES):  # colours of another class: mistakes
        write_image(data / "test" / name / "<b>odd.png", (label + 1) % 3, 5)
    (data / "test" / "a & b" / "cut.png").write_bytes(b"\x89PNG")
    weights = write_checkpoint(root / "tiny.pth")
    train(data, weights, root / "deep", "--num-prompts", 3, "--lr", 3)
    train(data, weights, root / "linear", "--method", "linear", "--lr", 3)
    return root


@pytest.fixture(scope="module")
def page(workspace: Path) -> tuple[Any, str]:
    result = call(
        "report", workspace / "deep", workspace / "linear", "--output", workspace / "page.html"
    )
    return result, (workspace / "page.html").read_text(encoding="utf-8")


def test_it_names_evaluated_and_missing_images(page: Any) -> None:
    result, text = page
    assert result.exit_code == 1
    assert result.stderr.count("cut.png cannot be decoded") == 1
    assert re.search(r"^deep: test, 12 images, top-1 ", result.stdout, re.M)
    assert "1 entry is not in these figures" in text
    assert "Method linear has no prompts" in text


def test_nothing_is_loaded_and_names_are_escaped(page: Any) -> None:
    text = page[1]
    read = Reader(text)
    assert all(source.startswith(("data:", "#")) for source in read.sources)
    assert read.tags.count("script") == 1 and "b" not in read.tags
    assert "&lt;script&gt;alert(1)&lt;" in text and "a &amp; b" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_it_is_accessible(page: Any) -> None:
    read = Reader(page[1])
    assert len(read.ids) == len(set(read.ids))
    used = {source[1:] for source in read.sources if source.startswith("#")}
    assert used <= set(read.ids)
    assert read.images and all(image["alt"] for image in read.images)
    assert all(head.get("scope") in ("row", "col") for head in read.heads)
    assert '<html lang="en">' in page[1] and 'name="viewport"' in page[1]


def test_figures_are_those_of_training(workspace: Path) -> None:
    (run,) = read_runs([workspace / "deep"])
    found = evaluate_run(run, EvaluationOptions(progress=False))
    assert run.record is not None and run.record.test is not None
    assert found.evaluation.top1 == run.record.test["top1"]
    assert float(found.losses.mean()) == pytest.approx(run.record.test["loss"], rel=1e-5)
    assert len(found.indices) == 12
    targets = [found.split.labels[index] for index in found.indices]
    assert targets == found.evaluation.labels.tolist()
    config = json.loads((workspace / "deep" / "best" / "adapter_config.json").read_text())
    assert run.kept is not None and config["method"]["num_prompts"] == 3


def test_mistakes_are_the_worst_ones(workspace: Path) -> None:
    (run,) = read_runs([workspace / "deep"])
    found = evaluate_run(run, EvaluationOptions(progress=False))
    worst = worst_mistakes(found, count=1)
    wrong = found.evaluation.labels != found.evaluation.predictions
    assert worst.total == int(wrong.sum()) > 0
    first = worst.highest_loss[0]
    assert first.loss == pytest.approx(float(found.losses[wrong].max()))
    assert first.loss == pytest.approx(-math.log(first.label_probability), rel=1e-3)
    assert first.label != first.prediction and first.probability > first.label_probability
    assert first.name.startswith("test/") and first.picture.startswith("data:image/png;base64,")
    assert first.name not in {item.name for item in worst.most_confident}


def test_use_of_prompts_adds_up(workspace: Path) -> None:
    (run,) = read_runs([workspace / "deep"])
    found = evaluate_run(run, EvaluationOptions(progress=False))
    use = expert_use(found, EvaluationOptions(max_images=5, batch_size=2))
    again = expert_use(found, EvaluationOptions(max_images=5, batch_size=5))
    assert use.images == 5 and use.shares.shape == (len(use.blocks), 3)
    np.testing.assert_allclose(use.shares, again.shares, rtol=1e-5)
    assert np.all(use.shares > 0) and np.all(use.shares.sum(axis=1) < 1)
    assert np.all((use.effective > 1) & (use.effective <= 3 + 1e-9))


def test_a_run_without_its_data_still_has_curves(workspace: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(workspace / "deep", tmp_path / "deep")
    record = json.loads((moved / "run.json").read_text())
    record["data"]["directory"] = str(tmp_path / "gone")
    record["state"] = "running"
    (moved / "run.json").write_text(json.dumps(record))
    with (moved / "metrics.csv").open("a") as file:
        file.write("3,0.5,")
    result = call("report", moved, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text()
    assert "Not evaluated" in text and "is not there; pass --data if it has moved" in text
    assert "Validation accuracy" in text and "Line 4 of metrics.csv is damaged" in text
    assert "it was killed, or is still being trained" in text
    result = call(
        "report", moved, "--output", tmp_path / "page.html", "--data", workspace / "data",
        "--split", "validation", "--max-images", 2, "--overwrite",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "deep: val, 6 images" in result.stdout


def test_a_run_without_a_record_needs_data(workspace: Path, tmp_path: Path) -> None:
    old = shutil.copytree(workspace / "linear", tmp_path / "linear")
    (old / "run.json").unlink()
    result = call("report", old, "--output", tmp_path / "page.html")
    assert result.exit_code == 0 and "pass --data" in result.stdout
    options = ["--data", workspace / "data", "--checkpoint", workspace / "tiny.pth"]
    result = call("report", old, "--output", tmp_path / "page.html", *options)
    assert result.exit_code == 2 and "replace it with --overwrite" in result.stderr
    options.append("--overwrite")
    result = call("report", old, "--output", tmp_path / "page.html", *options)
    assert "linear: test, 12 images" in result.stdout


def test_sweeps_have_their_table(tmp_path: Path) -> None:
    rows = [("<i>", 1, 0, 5, 90, seed, top1, 0.1, 7, 800, 2) for seed, top1 in ((1, 80), (2, 82))]
    lines = [",".join(map(str, row)) for row in (HEADER, *rows)]
    (tmp_path / "sweep.csv").write_text("\n".join(lines))
    result = call("report", tmp_path, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text()
    assert "81.00" in text and "1.41" in text and "&lt;i&gt;" in text


def test_wrong_arguments_are_one_line(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.html").write_text("mine")
    for arguments, message in (
        ([workspace / "deep", "--output", tmp_path / "notes.html"], "not of an earlier report"),
        ([tmp_path / "none", "--output", tmp_path / "p.html"], "there is no run folder"),
        ([tmp_path, "--output", tmp_path / "p.html"], "is no run"),
        ([workspace / "deep", "--output", tmp_path / "p.html", "--split", "tset"], "'tset'"),
        (
            [workspace / "deep", "--output", tmp_path / "p.html", "--data", tmp_path / "x"],
            "no data",
        ),
    ):
        result = call("report", *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.html"]
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_many_classes_stay_legible_and_rows_add_up() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 555, 5000)
    predictions = np.where(rng.random(5000) < 0.8, labels, rng.integers(0, 555, 5000))
    labels, predictions = np.append(labels, [7] * 9), np.append(predictions, [400] * 9)
    names = [f"class {i}" for i in range(555)]
    counts = count_confusions(labels, predictions, 555)
    shown = shown_matrix(counts, names, limit=24)
    assert len(shown.names) == 25 and shown.others == 531 and shown.counts.sum() == 5009
    i, j = shown.names.index("class 7"), shown.names.index("class 400")
    assert shown.counts[i, j] == counts[7, 400] and shown.counts[i].sum() == counts[7].sum()
    top = frequent_confusions(counts, names)[0]
    assert (top.label, top.prediction, top.count) == ("class 7", "class 400", counts[7, 400])


def test_classes_without_images_come_last() -> None:
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    rows = class_rows(labels, predictions, count_confusions(labels, predictions, 3), "abc")
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert (rows[0].accuracy, rows[0].precision, rows[0].mistaken_for) == (0.5, 1.0, ("b", 1))
    assert rows[1].precision == pytest.approx(2 / 3) and rows[1].mistaken_for is None
    assert (rows[2].accuracy, rows[2].precision, rows[2].images) == (None, None, 0)
