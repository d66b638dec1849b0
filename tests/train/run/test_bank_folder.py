"""A bank opens with every valid adapter of a folder, and skips an invalid one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.adapter_editing import rewrite_config, rewrite_tensors

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from examples.serve.trial import write_adapters
from vpt_fast.adapter.files import CONFIG_FILE, TENSORS_FILE
from vpt_fast.train.run.bank_folder import open_bank


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_config(folder, lambda config: config.update(values))


def _part(part: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_config(folder, lambda config: config[part].update(values))


def _args(**values: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_config(folder, lambda c: c["model"]["args"].update(values))


def _text(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(content)

    return write


def _cut(folder: Path) -> None:
    (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:100])


def _nan(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors["head.bias"].fill_(torch.nan))


BAD: dict[str, Callable[[Path], None]] = {
    "no json": _text("{"),
    "a list": _text("[]"),
    "deep": _text("[" * 100_000),
    "nan": _text('{"format_version": NaN}'),
    "no tensors": lambda folder: (folder / TENSORS_FILE).unlink(),
    "cut tensors": _cut,
    "not finite": _nan,
    "newer": _config(format_version=99),
    "class names": _config(class_names=3),
    "method": _config(method={"name": ["vpt-deep"]}),
    "method's field": _part("method", num_prompts=-1),
    "method's type": _part("method", num_prompts=[]),
    "name of a path": _part("model", name="/etc/passwd"),
    "unknown name": _part("model", name="resnet_of_mine"),
    "another model": _part("model", name="resnet18", checkpoint=None),
    "no name": _part("model", name=None),
    "a source": _part("model", source="local-dir:/nowhere", checkpoint=None),
    "a checkpoint": _part("model", checkpoint="mine.pth"),
    "width": _part("model", width=1 << 40),
    "depth": _args(depth=9),
    "huge": _args(embed_dim=1 << 16, depth=1 << 10),
    "wide": _args(embed_dim=1 << 14),
    "heads": _args(num_heads=7),
    "a file": _args(checkpoint_path="/etc/passwd"),
    "an address": _args(pretrained_cfg_overlay={"url": "https://example.org/x"}),
    "input": _part("input", input_size=[3, 7]),
    "another size": _part("input", input_size=[3, 64, 64]),
    "grey": _part("input", input_size=[1, 32, 32], mean=[0.5], std=[0.5]),
    "std": _part("input", std=[0.0, 1.0, 1.0]),
    "crop": _part("input", crop_pct=-1),
    "interpolation": _part("input", interpolation="magic"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("bank"), 2)


def named(case: str) -> str:
    """Return the folder of a bad adapter, which comes before good ones."""
    return "a-bad-one-" + case.replace(" ", "-").replace("'", "")


@pytest.fixture(scope="module")
def opened(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    """Open a folder of two good adapters and every bad one; return the bank and the refusals."""
    folder = tmp_path_factory.mktemp("bad") / "bank"
    shutil.copytree(good, folder)
    for case, damage in BAD.items():
        shutil.copytree(good / "task-0", folder / named(case))
        damage(folder / named(case))
    return open_bank(folder)


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_left_out(case: str, opened: tuple[Any, list[str]]) -> None:
    (line,) = (text for text in opened[1] if text.startswith(f"{named(case)} is left out: "))
    assert "\n" not in line and len(line) < 600


def test_valid_adapters_are_loaded(opened: tuple[Any, list[str]]) -> None:
    bank, refused = opened
    assert bank.tasks == ("task-0", "task-1") and len(refused) == len(BAD)
    assert len(bank(torch.zeros(2, 3, 32, 32), ["task-0", "task-1"])) == 2


def test_files_of_a_killed_save_are_not_a_task(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bank")
    shutil.copytree(good / "task-0", tmp_path / "bank" / ".task-0.writing-0123")
    bank, refused = open_bank(tmp_path / "bank")
    assert bank.tasks == ("task-0", "task-1") and refused == []


def test_configurations_are_standard_json(good: Path) -> None:
    json.loads((good / "task-0" / CONFIG_FILE).read_text(), parse_constant=pytest.fail)
