"""Configurations that `save_adapter` would not write: refused in one line, nothing is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.adapter_editing import rewrite_config
from support.adapters.flipped_bits import flipped_bits
from support.formulations.families import TOKEN
from test_adapter import CONFIG, NAMES, TENSORS, save, trained
from test_adapter_refusals import plain

from vpt_fast import VPTDeep, load_adapter
from vpt_fast.adapter.files import read_adapter, read_config


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter", class_names=NAMES)


def _args(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"]["args"].update(values)


def _input(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["input"].update(values)


def _model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"].update(values)


URL = "https://example.org/weights.pth"
WRONG: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_args(checkpoint_path="/etc/passwd"), "args.checkpoint_path is no argument"),
    (_args(pretrained=True), "args.pretrained is no argument"),
    (_args(pretrained_cfg={"url": URL}), "args.pretrained_cfg is no argument"),
    (_args(pretrained_cfg_overlay={"url": URL}), "pretrained_cfg_overlay"),
    (_args(pretrained_cfg_overlay={"file": "/etc/passwd"}), "pretrained_cfg_overlay"),
    (_args(cache_dir="elsewhere"), "args.cache_dir"),
    (_args(features_only=True), "args.features_only"),
    (_args(depth=10**12), "args.depth is 1000000000000"),
    (_args(init_values={"a": 1}), "args.init_values"),
    (_model(name="local-dir:/etc"), "model.name is 'local-dir:/etc'"),
    (_model(name="../x"), "model.name"),
    (_model(name=3), "model.name"),
    (_model(source="https://example.org"), "model.source"),
    (_model(source=["hf-hub:a/b"]), "model.source"),
    (_model(width="64"), "model.width"),
    (_model(depth=0), "model.depth"),
    (_model(depth=True), "model.depth"),
    (_model(args=None), "model.args"),
    (_model(checkpoint=7), "model.checkpoint"),
    (_input(input_size=[3, 24]), "input_size"),
    (_input(input_size=[3, 24, 10**9]), "input_size"),
    (_input(input_size=[3, 24.0, 24]), "input_size"),
    (_input(mean="0.5"), "mean"),
    (_input(mean=[0.5, 0.5]), "mean"),
    (_input(std=[0, 1, 1]), "std"),
    (_input(std=[10**400, 1, 1]), "std"),
    (_input(crop_pct=0), "crop_pct"),
    (_input(crop_pct=None), "crop_pct"),
    (_input(crop_mode="middle"), "crop_mode"),
    (_input(interpolation="cubic"), "interpolation"),
    (_input(interpolation=["bicubic"]), "interpolation"),
    (lambda c: c.update(class_names=[1, 2, 3, 4, 5]), "class_names"),
    (lambda c: c.update(class_names=["a"]), "class_names"),
    (lambda c: c.update(format_version=True), "format_version"),
    (lambda c: c.update(format_version=0), "format_version"),
    (lambda c: c.update(architecture=[]), "architecture"),
    (lambda c: c.update(fixed_image={"dtype": "float32"}), "fixed_image"),
    (lambda c: c["fingerprint"].update(norm=None), "fingerprint of norm"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_wrong_values(change: Callable[[dict[str, Any]], Any], words: str, adapter: Path) -> None:
    rewrite_config(adapter, change)
    with pytest.raises(ValueError) as refusal:
        read_config(adapter)
    assert words in str(refusal.value)
    assert CONFIG in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_values_that_are_no_numbers(text: str, adapter: Path) -> None:
    path = adapter / CONFIG
    path.write_text(path.read_text().replace('"crop_pct": 0.9', f'"crop_pct": {text}'))
    with pytest.raises(ValueError, match=f"damaged: {text} is no number"):
        read_config(adapter)


def test_a_change_by_hand_is_refused(adapter: Path) -> None:
    path = adapter / CONFIG
    path.write_text(path.read_text().replace(NAMES[0], "class of mine"))
    with pytest.raises(ValueError, match="changed after it was saved"):
        read_config(adapter)


def test_order_and_white_space_do_not_count(adapter: Path) -> None:
    path = adapter / CONFIG
    expected = read_config(adapter)
    path.write_text(json.dumps(expected, sort_keys=True, indent=7))
    assert read_config(adapter) == expected


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_flipped_bits(name: str, flips: int, adapter: Path) -> None:
    """The adapter is refused, or has the same values: white space may change."""
    path = adapter / name
    content = path.read_bytes()
    config, tensors = read_adapter(adapter)
    refused = 0
    for damaged in flipped_bits(content, flips):
        path.write_bytes(damaged)
        try:
            found, values = read_adapter(adapter)
        except ValueError as error:
            assert name in str(error)
            refused += 1
        else:
            assert found == config
            assert all(torch.equal(values[key], value) for key, value in tensors.items())
    assert refused > flips * 0.6
    path.write_bytes(content)
    load_adapter(plain(), adapter)
