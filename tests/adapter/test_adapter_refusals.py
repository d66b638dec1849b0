"""Adapters that do not fit, are damaged or would overwrite files are refused; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.adapter_editing import rewrite_config, rewrite_tensors
from support.formulations import families
from support.formulations.families import CLASSES, TOKEN
from support.unchanged import assert_unchanged, snapshot
from test_adapter import CONFIG, FINGERPRINT, TENSORS, save, trained
from torch import nn

from vpt_fast import VPTDeep, load_adapter, prompt_tune, save_adapter
from vpt_fast.adapter import atomic
from vpt_fast.adapter.files import read_config


def plain(**changes: Any) -> nn.Module:
    return families.build(TOKEN, dtype=torch.float32, **changes)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter")


def refuse(model: nn.Module, directory: Path, *words: str) -> None:
    """Assert a refusal that contains the words and leaves the model unchanged."""
    before = snapshot(model)
    with pytest.raises(ValueError) as refusal:
        load_adapter(model, directory)
    for word in words:
        assert word.lower() in str(refusal.value).lower(), f"{word!r}: {str(refusal.value)!r}"
    assert_unchanged(model, before)


def test_other_weights(adapter: Path) -> None:
    refuse(plain(seed=5), adapter, "backbone", "cls_token", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "name", ["blocks.1.mlp.fc1.weight", "blocks.3.attn.qkv.weight", "patch_embed.proj.weight"]
)
def test_one_weight_with_the_same_norm(name: str, adapter: Path) -> None:
    """Rows in another order have the same norm and another random projection."""
    model = plain()
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        weight.copy_(weight.flip(0))
    refuse(model, adapter, name)


@pytest.mark.parametrize(
    "name", ["blocks.2.norm1.weight", "blocks.0.attn.qkv.bias", "norm.bias", "pos_embed"]
)
def test_one_small_weight_scaled(name: str, adapter: Path) -> None:
    model = plain()
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.1)
    refuse(model, adapter, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 96}, ["64", "96"]),
        ({"depth": 3}, ["blocks", "4", "3"]),
        ({"depth": 5}, ["blocks", "4", "5"]),
        ({"num_classes": 7}, [str(CLASSES), "7"]),
        ({"num_classes": 0}, [str(CLASSES)]),
        ({"img_size": 32}, ["pos_embed"]),
        ({"patch_size": 12}, ["pos_embed"]),
        ({"patch_size": 4, "img_size": 12}, ["patch_embed.proj.weight"]),
        ({"qkv_bias": False}, ["qkv.bias"]),
    ],
)
def test_another_architecture(changes: dict[str, Any], words: list[str], adapter: Path) -> None:
    refuse(plain(**changes), adapter, *words)


def test_a_backbone_with_more_weights(adapter: Path) -> None:
    """All weights that the adapter knows are equal, but LayerScale changes the function."""
    model = plain(init_values=0.5)
    found = model.load_state_dict(plain().state_dict(), strict=False)
    assert found.missing_keys
    assert not found.unexpected_keys
    refuse(model, adapter, "ls1.gamma")


def test_a_tuned_model_and_an_untuned_one(adapter: Path, tmp_path: Path) -> None:
    refuse(prompt_tune(plain(), VPTDeep(3)), adapter, "remove_prompts")
    model = plain()
    with pytest.raises((TypeError, ValueError), match="prompt_tune"):
        save_adapter(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_model_still_works_after_a_refusal(adapter: Path) -> None:
    model, image = plain(seed=5), families.images(TOKEN, dtype=torch.float32)
    expected = model(image)
    refuse(model, adapter, "backbone")
    assert torch.equal(model(image), expected)
    prompt_tune(model, VPTDeep(2))


def _rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        rewrite_config(directory, change)

    return damage


def _restore(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        rewrite_tensors(directory, change)

    return damage


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(keep * len(content))])

    return damage


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return damage


def _flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / TENSORS).read_bytes())
    content[-1000] ^= 1
    (directory / TENSORS).write_bytes(content)


PROMPT = "blocks.2.prompt.tokens"
DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "half_tensors": (_cut(TENSORS, 0.5), [TENSORS]),
    "almost_all_tensors": (_cut(TENSORS, 0.999), [TENSORS]),
    "no_tensors": (_cut(TENSORS, 0.0), [TENSORS]),
    "noise": (_write(TENSORS, bytes(range(256)) * 40), [TENSORS]),
    "missing_tensor": (_restore(lambda t: t.pop(PROMPT)), [PROMPT]),
    "missing_head": (_restore(lambda t: t.pop("head.bias")), ["head.bias"]),
    "extra_tensor": (_restore(lambda t: t.update(extra=torch.ones(2))), ["extra"]),
    "backbone_tensor": (_restore(lambda t: t.update({"norm.bias": torch.ones(64)})), ["norm.bias"]),
    "other_shape": (_restore(lambda t: t.update({PROMPT: torch.ones(3, 63)})), [PROMPT, "63"]),
    "other_count": (_restore(lambda t: t.update({PROMPT: torch.ones(4, 64)})), [PROMPT, "4"]),
    "nan": (_restore(lambda t: t[PROMPT].fill_(float("nan"))), [PROMPT]),
    "half_fingerprint": (_cut(FINGERPRINT, 0.5), [FINGERPRINT]),
    "other_fingerprint": (_write(FINGERPRINT, b"{}"), [CONFIG, "fingerprint"]),
    "half_json": (_cut(CONFIG, 0.5), [CONFIG]),
    "no_json": (_cut(CONFIG, 0.0), [CONFIG]),
    "binary_json": (_write(CONFIG, b"\xff\xfe\x00\x01"), [CONFIG]),
    "json_list": (_write(CONFIG, b"[1, 2]"), [CONFIG]),
    "json_number": (_write(CONFIG, b"3"), [CONFIG]),
    "newer_format": (_rewrite(lambda c: c.update(format_version=999)), ["999", "upgrade"]),
    "no_format": (_rewrite(lambda c: c.pop("format_version")), ["format_version"]),
    "text_format": (_rewrite(lambda c: c.update(format_version="1")), ["format_version"]),
    "no_method": (_rewrite(lambda c: c.pop("method")), ["method"]),
    "no_fingerprint": (_rewrite(lambda c: c.pop("fingerprint")), ["fingerprint"]),
    "odd_fingerprint": (_rewrite(lambda c: c.update(fingerprint=3)), ["fingerprint"]),
    "unknown_method": (_rewrite(lambda c: c["method"].update(name="lora")), ["lora", "vpt-deep"]),
    "unknown_field": (_rewrite(lambda c: c["method"].update(rank=4)), ["rank"]),
    "bad_field": (_rewrite(lambda c: c["method"].update(dropout=2.0)), ["dropout", "2.0"]),
    "other_prompts": (_rewrite(lambda c: c["method"].update(num_prompts=4)), ["prompt"]),
    "other_blocks": (_rewrite(lambda c: c["method"].update(blocks=[0])), ["prompt"]),
    "blocks_beyond": (_rewrite(lambda c: c["method"].update(blocks=[0, 9])), ["blocks", "9"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, adapter: Path) -> None:
    damage, words = DAMAGE[case]
    damage(adapter)
    refuse(plain(), adapter, *words)


def test_silent_damage_of_the_weights(adapter: Path) -> None:
    """One bit of a stored weight is flipped, which only a checksum detects."""
    _flip_a_bit(adapter)
    refuse(plain(), adapter, TENSORS)


@pytest.mark.parametrize("name", [TENSORS, CONFIG, FINGERPRINT, None])
def test_missing_files(name: str | None, adapter: Path) -> None:
    if name is None:
        shutil.rmtree(adapter)
    else:
        (adapter / name).unlink()
    model = plain()
    before = snapshot(model)
    with pytest.raises((FileNotFoundError, ValueError)) as refusal:
        load_adapter(model, adapter)
    assert (name or str(adapter)) in str(refusal.value)
    assert_unchanged(model, before)
    if name != TENSORS:
        with pytest.raises(FileNotFoundError, match="adapter"):
            read_config(adapter)


def _content(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_an_existing_directory_is_not_overwritten(adapter: Path) -> None:
    before = _content(adapter.parent)
    other = trained(TOKEN, VPTDeep(5))
    with pytest.raises(FileExistsError, match="overwrite") as refusal:
        save(other, adapter)
    assert str(adapter) in str(refusal.value)
    assert _content(adapter.parent) == before
    save(other, adapter, overwrite=True)
    assert read_config(adapter)["method"]["num_prompts"] == 5
    names = ("README.md", CONFIG, FINGERPRINT, TENSORS)
    assert sorted(_content(adapter.parent)) == [f"adapter/{name}" for name in names]


def test_only_adapters_are_overwritten(tmp_path: Path) -> None:
    """A slip like `save_adapter(model, "~", overwrite=True)` must not empty a folder."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    with pytest.raises((OSError, ValueError), match="photos"):
        save(trained(TOKEN, VPTDeep(2)), tmp_path / "photos", overwrite=True)
    assert _content(tmp_path / "photos") == {"one.jpg": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("broken", ["os.replace and os.rename", "json", "writing"])
def test_written_whole_or_not_at_all(
    broken: str, overwrite: bool, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step fails, the old adapter stays and no part of a new one remains."""
    target = adapter if overwrite else adapter.parent / "new"
    before = _content(adapter.parent)
    other = trained(TOKEN, VPTDeep(5))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    if broken == "json":
        monkeypatch.setattr(json, "dumps", fail)
        monkeypatch.setattr(json, "dump", fail)
    elif broken == "writing":
        monkeypatch.setattr("builtins.open", fail)
        monkeypatch.setattr(Path, "write_text", fail)
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "rename", fail)
        monkeypatch.setattr(atomic, "_exchange_names", fail)
    with pytest.raises((OSError, TypeError, ValueError)):
        save(other, target, overwrite=overwrite)
    monkeypatch.undo()
    assert _content(adapter.parent) == before
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]
    load_adapter(plain(), adapter)


def test_a_backbone_with_nan(tmp_path: Path) -> None:
    """NaN would differ from every backbone when fingerprints are compared."""
    model = trained(TOKEN, VPTDeep(2))
    with torch.no_grad():
        model.get_parameter("cls_token").fill_(torch.nan)
    with pytest.raises(ValueError, match="cls_token of the backbone has values that are not fin"):
        save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a", "b"], [], "abcde"])
def test_class_names_that_do_not_fit(names: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="class.names"):
        save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter", class_names=names)
    assert list(tmp_path.iterdir()) == []
