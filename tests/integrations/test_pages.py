"""The program of every page about an integration runs, and did what the page says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.doc_pages import ROOT, blocks

import vpt_fast
from vpt_fast.backbones.demo_backbone import demo_backbone

PAGES = ROOT / "docs" / "integrations"
NEEDS = {
    "accelerate": "accelerate",
    "lightning": "lightning",
    "onnx": "onnxruntime",
    "peft": "peft",
    "torchao": "torchao",
    "transformers": "transformers",
}


def outputs(model: Any) -> torch.Tensor:
    """Return a model's logits for fixed images, in eval mode."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images)
    return logits


def assert_trained(model: Any) -> None:
    """Assert that the head, which starts at zero or small, and every prompt have moved."""
    names = [name for name, _ in vpt_fast.trainable_parameters(model)]
    assert "head.weight" in names and sum("prompt" in name for name in names) >= 6
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(b.attn.qkv.weight.grad is None for b in model.blocks)


def loaded(folder: str = "adapter") -> Any:
    return vpt_fast.load_adapter(demo_backbone(num_classes=3), folder)


def check_index(names: Any) -> None:
    assert torch.equal(outputs(names["again"]), outputs(names["model"]))
    assert_trained(names["model"])
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["class_names"] == ["disc", "square", "ring"]


def check_timm(names: Any) -> None:
    assert_trained(names["model"])
    ema = names["ema"].module
    assert torch.equal(outputs(loaded("averaged-adapter")), outputs(ema))
    assert not torch.equal(outputs(ema), outputs(names["model"]))
    state, plain = ema.state_dict(), demo_backbone(num_classes=3).state_dict()
    assert all(torch.equal(state[n], t) for n, t in plain.items() if not n.startswith("head."))
    optimizer = names["optimizer"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {id(p) for _, p in vpt_fast.trainable_parameters(names["model"])}
    rates = names["create_optimizer_v2"](names["model"], opt="sgd", lr=1.0, layer_decay=0.75)
    assert min(group["lr_scale"] for group in rates.param_groups) == pytest.approx(0.75**6)


def check_lightning(names: Any) -> None:
    module = names["module"]
    state = torch.load(names["checkpoint"], weights_only=False)["state_dict"]
    assert {*state} == {f"model.{n}" for n, _ in vpt_fast.trainable_parameters(module.model)}
    assert torch.equal(outputs(names["again"].model), outputs(module.model))
    assert torch.equal(outputs(loaded()), outputs(module.model))


def check_accelerate(names: Any) -> None:
    assert_trained(names["tuned"])
    assert torch.equal(outputs(loaded()), outputs(names["tuned"]))
    torch.testing.assert_close(outputs(names["baked"]), outputs(names["tuned"]))


def check_transformers(names: Any) -> None:
    assert_trained(names["tuned"])
    assert names["scores"]["eval_loss"] > 0
    assert torch.equal(outputs(loaded()), outputs(names["tuned"]))
    inner = names["wrapper"].timm_model
    assert_trained(inner)
    torch.testing.assert_close(outputs(names["again"]), outputs(inner))


def check_peft(names: Any) -> None:
    tuned = names["tuned"]
    assert_trained(tuned)
    assert any(p.abs().sum() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    for name in ("again", "baked", "merged"):
        torch.testing.assert_close(outputs(names[name]), outputs(tuned), rtol=1e-4, atol=1e-5)
    with safe_open("adapter/adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lora" in key]  # noqa: SIM118
    with safe_open("lora/adapter_model.safetensors", "pt") as file:
        assert all("lora" in key for key in file.keys())  # noqa: SIM118


def check_onnx(names: Any) -> None:
    assert Path("deep.onnx").stat().st_size and Path("vapt.onnx").stat().st_size


def check_torchao(names: Any) -> None:
    assert_trained(names["model"])
    weight = names["model"].blocks[0].attn.qkv.weight
    assert "Int8" in type(weight).__name__
    assert torch.equal(outputs(names["again"]), outputs(names["model"]))
    with pytest.raises(ValueError, match="is for another backbone"):
        loaded()
    whole = vpt_fast.prompt_tune(demo_backbone(num_classes=3), vpt_fast.VPTDeep(4))
    names["quantize_"](whole, names["Int8WeightOnlyConfig"]())
    assert "head.weight" not in dict(vpt_fast.trainable_parameters(whole))


def check_segmentation(names: Any) -> None:
    scores = names["scores"]
    assert scores["VPTDeep"] > scores["LinearProbe"] + 0.02 > 0.4, scores


CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): check
    for name, check in globals().copy().items()
    if name.startswith("check_")
}


def test_every_page_has_a_check() -> None:
    with_python = {page.stem for page in PAGES.glob("*.md") if blocks(page.read_text(), "python")}
    assert with_python == CHECKS.keys()
    assert all(len(page.read_text().splitlines()) <= 84 for page in PAGES.glob("*.md"))


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("name", CHECKS)
def test_the_program_of_a_page(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "program"}
    for number, block in enumerate(blocks((PAGES / f"{name}.md").read_text(), "python")):
        exec(compile(block, f"{name}.md, block {number}", "exec"), names)
    CHECKS[name](names)
