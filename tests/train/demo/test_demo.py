"""The demo: its data, its output, and the adapter that it saves and loads."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vpt_fast import methods
from vpt_fast.adapter.files import read_config
from vpt_fast.backbones.build import data_config_of
from vpt_fast.backbones.demo_backbone import demo_backbone
from vpt_fast.cli.app import app
from vpt_fast.train.common.curves import format_bytes, format_table
from vpt_fast.train.data.images import eval_transform
from vpt_fast.train.data.pictures import load_image
from vpt_fast.train.demo import demo
from vpt_fast.train.demo import study as demo_study
from vpt_fast.train.demo import task as demo_task
from vpt_fast.train.demo.demo import main

METHODS = ("linear", "vpt-shallow", "vpt-deep", "vapt")


@pytest.fixture(scope="module")
def digits():
    return demo_task.load_splits()


@pytest.fixture
def few(digits, monkeypatch):
    """Use a tenth of the digits, where the result does not matter."""

    def tenth(part):
        part = copy.copy(part)
        part.images, part.labels = part.images[::10], part.labels[::10]
        return part

    parts = [tenth(part) for part in (digits.train, digits.val, digits.test)]
    small = demo_task.Digits(*parts, digits.test_pixels[::10])
    for module in (demo, demo_study):
        monkeypatch.setattr(module, "load_splits", lambda: small)


def test_the_splits_are_disjoint_stratified_and_complete(digits):
    parts = (digits.train, digits.val, digits.test)
    assert [len(part) for part in parts] == [800, 200, 797]
    for part in parts:
        counts = np.bincount(part.labels.numpy(), minlength=10)
        assert counts.max() <= 1.15 * counts.min()
        assert part.images.shape[1:] == (3, 32, 32)
        assert part.images.min() >= -1 and part.images.max() <= 1
    rows = [image.numpy().tobytes() for part in parts for image in part.images]
    assert len(set(rows)) == 1797
    assert len(digits.test_pixels) == 797


def test_the_demo_writes_adapters_a_table_and_a_picture(tmp_path, capsys, digits):
    output = tmp_path / "out"
    assert main(["--epochs", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S[^|]*?) +\| +([\d,]+) \| +([\d.]+)% \|", printed, re.M)
    assert [row[0] for row in rows] == ["Linear probe", "VPT-Shallow", "VPT-Deep", "VAPT"]
    assert [row[1] for row in rows] == ["1,290", "2,570", "8,970", "6,418"]
    # Chance is 10%; after one epoch the shipped backbone is far above it.
    assert float(rows[0][2]) > 60
    accuracy = rows[-1][2]
    again = f"Loaded {output}/vapt onto a fresh backbone: {accuracy}% on test, the same 797"
    assert again in printed
    for name in METHODS:
        config = read_config(output / name)
        assert config["method"]["name"] == name
        assert config["class_names"] == [str(i) for i in range(10)]
    with Image.open(output / "demo.png") as picture:
        assert picture.size == (1800, 960)
        assert len(picture.convert("RGB").getcolors(1 << 22)) > 50
        # The digits are white on black, as in the model's input; the page around them is white.
        assert (np.asarray(picture.convert("L"))[:, 930:] == 0).mean() > 0.05
    assert len(json.loads((output / "demo.json").read_text())["results"]) == 4
    digit = load_image(output / "digit.png")
    prepared = eval_transform(data_config_of(demo_backbone(10)))(digit)
    assert torch.equal(prepared, digits.test[0][0])
    result = CliRunner().invoke(app, ["predict", str(output / "vapt"), str(output / "digit.png")])
    assert result.exit_code == 0 and result.stdout.startswith(f"{output}/digit.png: ")


def test_it_overwrites_only_its_own_output(tmp_path, capsys, few):
    arguments = ["--epochs", "1", "--methods", "linear", "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(arguments) == 2
    assert "out exists and is not of an earlier demo; choose another" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    assert main(arguments) == 0
    assert main(arguments) == 0


def test_seeds_give_mean_and_deviation(capsys, few):
    assert main(["--seeds", "1", "2", "3", "--epochs", "2", "--methods", "linear"]) == 0
    printed = capsys.readouterr().out
    each = [float(value) for value in re.findall(r"seed \d: ([\d.]+)%", printed)]
    assert len(set(each)) > 1
    mean, deviation = re.search(
        r"\| Linear probe \| +1,290 \| +([\d.]+) \| +([\d.]+) \|", printed
    ).groups()
    assert float(mean) == pytest.approx(np.mean(each), abs=0.01)
    assert float(deviation) == pytest.approx(np.std(each, ddof=1), abs=0.01)


def test_every_method_has_settings_of_both_lengths(capsys, few):
    """Of the demo's 20 epochs and of the papers' 100."""
    assert demo_task.STUDY_SETTINGS.keys() == demo_task.SETTINGS.keys()
    ours = {name for name, cls in methods.METHODS.items() if cls.__module__.startswith("vpt_fast.")}
    assert {setting.method.name for setting in demo_task.SETTINGS.values()} == ours
    names = ["vpt-deep", "vpt-deep-spt-mean", "full", "mlp-head"]
    assert main(["--seeds", "1", "--epochs", "1", "--methods", *names]) == 0
    printed = capsys.readouterr().out
    titles = r"^\| (VPT-Deep|VPT-Deep, spt-mean|Full|MLP head) +\|"
    assert len(re.findall(titles, printed, re.MULTILINE)) == 4
    for name, opt in (("full", "adamw"), ("cvpt", "sgd")):
        assert demo_task.recipe_of(demo_task.SETTINGS[name], 20, 1).opt == opt


def test_selection_takes_the_best_on_validation(capsys, few):
    grid = ["--lrs", "1e-6", "1", "--weight-decays", "1000", "0.0001"]
    assert main(["--select", "--epochs", "10", "--methods", "linear", *grid]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"Linear probe, lr \S+, weight decay \S+:", printed)) == 4
    assert "Linear probe: lr 1, weight decay 0.0001\n" in printed


def test_wrong_arguments_are_named(tmp_path, capsys):
    assert main(["--device", "tpu", "--output", str(tmp_path / "out")]) == 2
    assert "device is 'tpu'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["--methods", "vpt"])


def test_tables_are_aligned_and_sizes_are_readable():
    table = format_table(["a", "number"], [["long name", "1"], ["b", "1,000"]])
    assert len({len(line) for line in table.splitlines()}) == 1
    assert table.splitlines()[1] == "| --------- | -----: |"
    sizes = [format_bytes(count) for count in (999, 1000, 49_600, 999_499, 999_500, 2_081_378)]
    assert sizes == ["999 B", "1 kB", "50 kB", "999 kB", "1.0 MB", "2.1 MB"]
