"""The shipped backbone, and the program that pretrains it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer

from examples.pretrain_demo import training as pretrain_demo
from examples.pretrain_demo.glyphs import CLASSES, HELD_OUT_FONTS
from examples.pretrain_demo.muon import Muon
from vpt_fast.backbones.demo_backbone import (
    DEMO_ARGS,
    DEMO_CHECKPOINT,
    DEMO_MEAN,
    DEMO_MODEL,
    DEMO_STD,
    demo_backbone,
)


def test_the_shipped_file_is_small_half_precision_and_documented() -> None:
    assert DEMO_CHECKPOINT.stat().st_size <= 8_000_000
    state = load_file(DEMO_CHECKPOINT)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert state["head.weight"].shape[0] == len(CLASSES)
    card = DEMO_CHECKPOINT.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "digit", "Held-out", "DejaVu"):
        assert word in card


def test_it_is_a_plain_timm_vision_transformer() -> None:
    model = demo_backbone(num_classes=7)
    assert type(model) is VisionTransformer
    assert all(type(b) is Block and type(b.attn) is Attention for b in model.blocks)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert demo_backbone(num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 128)


def test_its_arguments_are_json_and_give_the_same_architecture() -> None:
    arguments = json.loads(json.dumps(DEMO_ARGS))
    model = timm.create_model(DEMO_MODEL, num_classes=10, **arguments)
    model.load_state_dict(demo_backbone(10).state_dict())
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 32, 32)
    assert tuple(config["mean"]) == DEMO_MEAN and tuple(config["std"]) == DEMO_STD
    assert config["crop_pct"] == 1.0


def test_only_the_head_is_new() -> None:
    torch.manual_seed(0)
    one = demo_backbone(10).state_dict()
    two = demo_backbone(10).state_dict()
    assert not torch.equal(one["head.weight"], two["head.weight"])
    stored = load_file(DEMO_CHECKPOINT)
    for name in stored.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(one[name], stored[name].float()), name


def test_it_classifies_renderings_and_fonts_it_has_not_seen() -> None:
    model = demo_backbone(num_classes=None)
    assert pretrain_demo.held_out_accuracy(model, 1000) > 0.8
    assert pretrain_demo.held_out_accuracy(model, 500, HELD_OUT_FONTS) > 0.6
    assert model.training


def test_arguments_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes .* not -1"):
        demo_backbone(-1)
    with pytest.raises(FileNotFoundError, match="pretrain_demo"):
        demo_backbone(10, tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(DEMO_CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged.safetensors is not a demo backbone"):
        demo_backbone(10, damaged)
    state = load_file(DEMO_CHECKPOINT)
    del state["norm.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="missing .'norm.weight'"):
        demo_backbone(10, tmp_path / "short.safetensors")
    state = {**load_file(DEMO_CHECKPOINT), "pos_embed": torch.zeros(1, 5, 128)}
    save_file(state, tmp_path / "grid.safetensors")
    with pytest.raises(ValueError, match="of another shape .'pos_embed'"):
        demo_backbone(10, tmp_path / "grid.safetensors")


def test_muon_moves_matrices_along_orthogonal_ones() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s)) for s in ((64, 32), (32, 64), (96, 32))]
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    Muon(weights, lr=0.1, weight_decay=0.0).step()
    tall, wide, packed = ((b - w.detach()) / 0.1 for b, w in zip(before, weights, strict=True))
    for update, scale in ((tall, 2**0.5), (wide, 1.0), *((part, 1.0) for part in packed.chunk(3))):
        singular = torch.linalg.svdvals(update / scale)
        assert 0.3 < float(singular.median()) < 1.3 and float(singular.max()) < 1.3


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(ValueError, match=r"matrices, not a tensor of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [pretrain_demo.learning_rate(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1.0 and rates[700] == 1.0
    assert rates[850] == pytest.approx(0.5) and rates[1000] == 0.0


def _pretrained(folder: Path, name: str, **options: int) -> dict[str, torch.Tensor]:
    output = folder / name / "vit.safetensors"
    pretrain_demo.pretrain(output, epochs=2, batch_size=8, **options)
    assert not output.with_name("vit.safetensors.ckpt").exists()
    return load_file(output)


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_pretraining_is_seeded_and_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_demo, "STEPS_PER_EPOCH", 3)
    monkeypatch.setattr(pretrain_demo, "held_out_accuracy", lambda *_, **__: 0.5)
    whole = _pretrained(tmp_path, "whole", threads=2)
    assert _same(whole, _pretrained(tmp_path, "again", threads=1))
    assert not _same(whole, _pretrained(tmp_path, "other", seed=43))

    calls = []

    def stop(*_: object, **__: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(pretrain_demo, "held_out_accuracy", stop)
    with pytest.raises(KeyboardInterrupt):
        _pretrained(tmp_path, "stopped")
    with pytest.raises(ValueError, match="batch size.*--no-resume"):
        pretrain_demo.pretrain(tmp_path / "stopped" / "vit.safetensors", epochs=2, batch_size=16)
    assert _same(whole, _pretrained(tmp_path, "stopped"))
    assert demo_backbone(10, tmp_path / "stopped" / "vit.safetensors") is not None


def test_pretraining_refuses_an_odd_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 2, not 1, 5"):
        pretrain_demo.pretrain(tmp_path / "vit.safetensors", epochs=1, batch_size=5)
