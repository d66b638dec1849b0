"""Names and shapes of an adapter's tensors, from its method built on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.adapters.adapter_editing import rewrite_config, rewrite_tensors
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import VARIANTS
from support.formulations.plain_baselines import BASELINES
from support.unchanged import assert_unchanged, snapshot
from test_adapter import save, trained
from torch import nn

from vpt_fast import VAPT, VPTDeep, VPTShallow, load_adapter, prompt_tune, trainable_parameters
from vpt_fast.adapter import load
from vpt_fast.adapter.tensors import expected_tensors
from vpt_fast.checks import check_model

METHODS = {name: build(4) for name, build in VARIANTS.items()} | BASELINES


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=8,
        depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), num_classes=3,
    )  # fmt: skip


def assert_expected(model: nn.Module, method: Any) -> None:
    """Assert that names, shapes and types are those of `prompt_tune`; nothing changes."""
    before, state = snapshot(model), torch.random.get_rng_state()
    found = expected_tensors(model, method, check_model(model, method))
    assert_unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    tuned = prompt_tune(model, method)
    assert all(tensor.is_meta for tensor in found.values())
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (p.shape, p.dtype) for name, p in trainable_parameters(tuned)
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    assert_expected(families.build(TOKEN), METHODS[name])


@pytest.mark.parametrize("family", ["deit_distilled", "siglip_map", "vit_oblong", "headless"])
def test_other_models(family: str) -> None:
    assert_expected(families.build(family), VAPT(3))


@pytest.mark.parametrize("method", [VPTShallow(3), VPTDeep(3, blocks=[1, 3]), VAPT(3)])
def test_stages(method: Any) -> None:
    assert_expected(swin(), method)


def test_parts_of_other_kinds() -> None:
    """Scripted, compiled, parametrised and hooked modules, and a weight that two modules share."""
    model: Any = families.build(TOKEN, dtype=torch.float32)
    model.blocks[0].mlp = torch.jit.script(model.blocks[0].mlp)
    model.blocks[1].mlp = torch.compile(model.blocks[1].mlp)
    nn.utils.parametrizations.weight_norm(model.blocks[2].mlp.fc1)
    model.blocks[3].norm2.weight = model.blocks[2].norm2.weight
    model.blocks[2].register_forward_hook(lambda *_: None)
    assert_expected(model, VPTDeep(3))


Edit = Callable[[Path], Any]
WRONG: dict[str, tuple[Edit, str]] = {
    "missing": (
        lambda d: rewrite_tensors(d, lambda t: t.pop("blocks.2.prompt.tokens")),
        "has no blocks.2.prompt.tokens; load an adapter that was saved from this model and method",
    ),
    "more": (
        lambda d: rewrite_tensors(d, lambda t: t.update(extra=torch.ones(2))),
        "has extra, which this model and method do not train; load",
    ),
    "shape": (
        lambda d: rewrite_config(d, lambda c: c["method"].update(num_prompts=60_000)),
        r"prompt.tokens has shape \(3, 64\), this model and method need \(60000, 64\)",
    ),
    "far too many": (
        lambda d: rewrite_config(d, lambda c: c["method"].update(num_prompts=10**15)),
        "method.num_prompts is 1000000000000000, not a plain value of at most 65536",
    ),
    "type": (
        lambda d: rewrite_config(d, lambda c: c["method"].update(num_prompts="3")),
        "vpt-deep: num_prompts must be an int, got '3'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_anything_changes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter")
    edit, words = WRONG[case]
    edit(adapter)
    monkeypatch.setattr(load, "apply_method", lambda *_: pytest.fail("the model is tuned"))
    with pytest.raises(ValueError, match=words):
        load_adapter(families.build(TOKEN, dtype=torch.float32), adapter)


def test_a_model_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter")
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return check_model(*arguments)

    monkeypatch.setattr(load, "check_model", counted)
    monkeypatch.setattr("vpt_fast.tune.check_model", counted)
    load_adapter(families.build(TOKEN, dtype=torch.float32), adapter)
    assert len(calls) == 1
