"""Methods on the command line: the list, methods of one's own, initial values, rewinding."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from vpt_fast.cli.app import app
from vpt_fast.methods import METHODS, registry

SOURCE = """
from dataclasses import dataclass

import vpt_fast


@dataclass(frozen=True)
class Halved(vpt_fast.PromptMethod):
    share: float = 0.5
    kind: str = "a"


@vpt_fast.register_method("halved", Halved)
class HalvedPrompts(vpt_fast.PromptModule):
    def __init__(self, method, block):
        super().__init__()
        self.share = method.share
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self):
        return self.share * self.tokens

    def regulariser(self):
        return 1e-3 * self.tokens.square().sum()


@dataclass(frozen=True)
class Some(vpt_fast.PromptMethod):
    def prompted_blocks(self, depth):
        return tuple(range(depth - 1))


@vpt_fast.register_method("some", Some)
class SomePrompts(vpt_fast.PromptModule):
    def __init__(self, method, block):
        super().__init__()
        self.tokens = block.new_parameter(method.num_prompts, block.width)

    def forward(self):
        return self.tokens


@dataclass(frozen=True)
class Tapered(vpt_fast.PromptMethod):
    scales: tuple[float, ...] = (1.0,)
    halves: bool = True


@vpt_fast.register_method("tapered", Tapered)
class TaperedPrompts(vpt_fast.PromptModule):
    reads = "tokens"

    def __init__(self, method, block):
        super().__init__()
        count = 1 + (block.index % 3 if method.halves else 0)
        self.tokens = block.new_parameter(count, block.width)
        self.pair = block.new_parameter(2, 1 + block.index % 2, block.num_heads, block.head_dim)
        self.scales = method.scales

    def forward(self, x):
        return vpt_fast.Prompts(self.tokens + self.scales[0] * x[:, :1], *self.pair)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create images of two classes and a module with a method, in the working folder."""
    monkeypatch.chdir(tmp_path)
    methods, modules, path = dict(METHODS), dict(registry._MODULES), [*sys.path]
    (tmp_path / "halved_prompts.py").write_text(SOURCE)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        for number, label in enumerate(("dark", "light")):
            target = tmp_path / "photos" / split / label
            target.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 100, (32, 32, 3), generator=generator) + 100 * number
                Image.fromarray(pixels.byte().numpy()).save(target / f"{index}.png")
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("halved_prompts", None)
    for now, before in ((METHODS, methods), (registry._MODULES, modules)):
        now.clear()
        now.update(before)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


def train(*words: str, output: str = "out") -> Any:
    common = ("--model", "vpt_fast_demo", "--epochs", "1", "-j", "0", "--output", output)
    return run("train", "photos", *common, *words)


def test_the_list() -> None:
    result = run("methods", "--num-prompts", "10")
    assert result.exit_code == 0
    rows = {line.split()[1]: line for line in result.output.splitlines() if line.startswith("| ")}
    assert {"linear", "vpt-deep", "vapt", "e2vpt", "vfpt", "bpt", "dvpt", "cvpt", "gate-vpt"} <= (
        rows.keys()
    )
    for name, cells in {
        "vpt-deep": ("92,160", "ECCV 2022"), "vapt": ("55,608", "g = W vec"),
        "e2vpt": ("184,320", "2307.13770"), "gate-vpt": ("7,691", "P_(i+1)"),
    }.items():  # fmt: skip
        assert all(cell in rows[name] for cell in cells), rows[name]
    swin = run("methods", "--model", "swin_tiny_patch4_window7_224")
    assert "not for it" in next(x for x in swin.output.splitlines() if "cvpt" in x)
    assert "timm has no model 'vit_nope'" in run("methods", "--model", "vit_nope").output


def test_a_method_of_a_module(folder: Path) -> None:
    result = train("--method", "halved_prompts:Halved", "--set", "share=0.25", "--set", "kind=b")
    assert result.exit_code == 0, result.output
    config = json.loads((folder / "out/best/adapter_config.json").read_text())
    assert config["method"] == {
        "name": "halved", "num_prompts": 10, "dropout": 0.0, "share": 0.25, "kind": "b",
        "defined_in": "halved_prompts:Halved",
    }  # fmt: skip
    assert run("eval", "out", "photos").exit_code == 0
    del METHODS["halved"], sys.modules["halved_prompts"]
    result = run("eval", "out", "photos")
    assert result.exit_code == 2 and "vpt-fast --import halved_prompts ..." in result.output
    for words in (
        ("eval", "out", "photos"), ("predict", "out", "photos/val/dark/0.png"),
        ("inspect", "out", "photos/val/dark/0.png", "--output", "pictures"),
        ("export", "out", "--output", "halved.pt2"), ("methods", "--model", "vit_tiny_patch16_224"),
        ("memory", "--model", "vpt_fast_demo", "--method", "halved", "--prompts", "2",
         "--output", "memory"),
    ):  # fmt: skip
        result = run("--import", "halved_prompts", *words)
        assert result.exit_code == 0, (words, result.output)
    small = ("--model", "vpt_fast_demo", "--epochs", "1", "-j", "0")
    result = run("train", "photos", "--method", "halved_prompts:Halved", *small)
    assert result.exit_code == 0, result.output
    assert (folder / "output" / "photos-halved" / "run.json").is_file()


def test_numbers_of_prompts_that_differ_by_block(folder: Path) -> None:
    """Tables and pictures have as many as the block with the most."""
    own = ("--import", "halved_prompts")
    result = run(*own, "train", "photos", "--method", "tapered", "--set", "scales=[0.5, 1]",
                 "--set", "halves=true", "--model", "vpt_fast_demo", "--epochs", "1", "-j", "0",
                 "--output", "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    image = "photos/val/dark/0.png"
    result = run(*own, "inspect", "out", image, "--output", "pictures")
    assert result.exit_code == 0, result.output
    with (folder / "pictures/attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = {int(row["block"]): int(row["prompt"]) + 1 for row in rows}
    assert counts == {i: 2 + i % 3 + i % 2 for i in range(6)}
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["block"]] = totals.get(row["block"], 0.0) + float(row["share"]) / 4
    for index, total in totals.items():
        assert f"| {index:<5} | {100 * total:>15.2f}% |" in result.output, result.output
    assert "tapered, 2 to 5 prompts, 1 image" in result.output
    result = run(*own, "report", "out", "--output", "report.html")
    assert result.exit_code == 0, result.output
    page = (folder / "report.html").read_text()
    assert "scales 0.5 1" in page and "halves yes" in page
    assert page.count('<figure class="experts">') == 1 and "in use, of 5" in page
    assert " of 2</td>" in page and not re.search(r">\s*nan|nan%", page, re.IGNORECASE)
    result = run(*own, "train", "photos", "--method", "tapered", "--set", "halves=False",
                 "--set", "scales=(2.0,)", "--model", "vpt_fast_demo", "--epochs", "1", "-j", "0",
                 "--output", "other")  # fmt: skip
    assert result.exit_code == 0, result.output
    run(*own, "report", "other", "--output", "other.html")
    assert "halves no" in (folder / "other.html").read_text()


def test_memory_of_a_method_whose_blocks_are_chosen(folder: Path) -> None:
    """Zero prompts are among the default numbers; concatenation is left out where it is unknown."""
    own = ("--import", "halved_prompts", "memory", "--method", "some")
    result = run(*own, "--model", "vpt_fast_demo", "--output", "memory", "--prompts", "0,3")
    assert result.exit_code == 0, result.output
    with (folder / "memory/memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["num_prompts"] for row in rows} == {"0", "3"}
    assert "eager" in {row["provider"] for row in rows}
    swin = ("--model", "swin_tiny_patch4_window7_224", "--output", "swin", "--prompts", "2")
    result = run(*own, *swin)
    assert result.exit_code == 0, result.output
    assert "some has no published form here, so eager is left out" in result.output


def test_a_sweep_over_fields(folder: Path) -> None:
    common = ("--methods", "vpt-deep,halved", "--lrs", "1", "--weight-decays", "0", "--seeds", "42",
              "--epochs", "1", "--num-prompts", "2", "--model", "vpt_fast_demo", "--output", "sw",
              "-j", "0")  # fmt: skip
    test = folder / "photos" / "test"
    shutil.copytree(folder / "photos" / "val", test)
    result = run("--import", "halved_prompts", "sweep", "photos", *common, "--set", "share=0.25")
    assert result.exit_code == 0, result.output
    configs = [json.loads(p.read_text()) for p in folder.glob("sw/adapters/**/adapter_config.json")]
    found = {c["method"]["name"]: c["method"] for c in configs}
    assert found["halved"]["share"] == 0.25 and "share" not in found["vpt-deep"]
    for name in ("shares=1", "num_prompts=3"):
        result = run("--import", "halved_prompts", "sweep", "photos", *common, "--set", name)
        assert result.exit_code == 2
        assert f"--set '{name}' sets no field of any of vpt-deep, halved" in result.output


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--method", "halved_prompts:HalvedPrompts"), "a module; give the class of its settings"),
        (("--method", "halved_prompts:Tapered", "--set", "scales=x"), "scales must be tuple[float"),
        (("--method", "halved_prompts:Tapered", "--set", "halves=no"), "halves must be bool, got"),
        (("--method", "halved_prompts:Nothing"), "has no attribute 'Nothing'"),
        (("--method", "nothing_here:X"), "No module named 'nothing_here'"),
        (("--method", "nope"), "--method is 'nope'; choose one of linear, "),
        (("--method", "halved"), "give package.module:Class, or its name and --imp"),
        (("--method", "halved_prompts:Halved", "--set", "share"), "give name=value, with one of"),
        (("--method", "halved_prompts:Halved", "--set", "shares=1"), "sets no field of"),
        (("--method", "vfpt", "--set", "fourier_share=2"), "fourier_share must be in [0, 1]"),
        (("--method", "vfpt", "--set", "fourier_share=x"), "fourier_share must be a number"),
        (("--method", "bpt", "--set", "rank=999"), "rank=999, but the model's width is 128"),
        (("--method", "vapt", "--init", "vipamin"), "has no option --init"),
        (("--init", "kmeans"), "init must be one of uniform, "),
        (("--method", "vfpt", "--rewind", "out"), "--rewind is for --method e2vpt, not vfpt"),
        (("--method", "e2vpt", "--rewind", "out"), "out is not an adapter"),
    ],
)
def test_refusals(words: tuple[str, ...], why: str, folder: Path) -> None:
    result = train(*words)
    assert result.exit_code == 2 and why in result.output, result.output
    assert not (folder / "out").exists() and len(result.output.strip().splitlines()) == 1
    result = run("--import", "nothing_here", "methods")
    assert result.exit_code == 2 and "--import nothing_here: No module named" in result.output
    assert f"searched in {folder}" in result.output


def test_initial_values_are_of_training_images(folder: Path) -> None:
    result = train("--init", "spt-mean")
    assert result.exit_code == 0, result.output
    assert "initial prompts from 12 training images" in result.output
    config = json.loads((folder / "out/best/adapter_config.json").read_text())
    assert config["initialised"] == {"images": 12} and config["method"]["init"] == "spt-mean"
    assert "initial prompts" not in train("--resume", "--init", "spt-mean").output


def test_rewinding(folder: Path) -> None:
    """The masks are the first run's, the initial values the seed's."""
    shares = ("--set", "prune_tokens=0.4", "--set", "prune_pieces=0.25")
    first = train("--method", "e2vpt", "--num-prompts", "5", "--lr", "1e-9")
    assert first.exit_code == 0, first.output
    again = ("--method", "e2vpt", "--num-prompts", "5", "--rewind", "out", "--lr", "1e-9", *shares)
    result = train(*again, output="pruned")
    assert result.exit_code == 0, result.output
    assert "pruned 2 prompts and 6 pieces of others, as out says" in result.output
    before, after = (load_file(f"{x}/last/adapter_model.safetensors") for x in ("out", "pruned"))
    masks = {name: after[name] for name in after if name.endswith("_mask")}
    assert [int((t == 0).sum()) for _, t in sorted(masks.items())] == [6, 2]
    for name in before.keys() - masks.keys():
        assert torch.allclose(after[name], before[name], atol=1e-5), name
    result = train("--method", "e2vpt", "--num-prompts", "4", "--rewind", "out", output="other")
    assert result.exit_code == 2 and "give the same method and fields" in result.output
    result = train(*again, "--resume", output="pruned")
    assert result.exit_code == 0 and "pruned 2 prompts" not in result.output
    result = train(*again[:4], "--lr", "1e-9", *shares, "--resume", output="pruned")
    assert result.exit_code == 2 and "--rewind out" in result.output
