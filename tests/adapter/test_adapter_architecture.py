"""Adapters on backbones that compute something else with equal weights; sources of backbones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.adapters.adapter_editing import rewrite_config
from support.formulations import families
from support.formulations.families import FAMILIES, TOKEN
from test_adapter import save, trained
from test_adapter_refusals import plain, refuse
from timm.layers import QuickGELU, RmsNorm
from torch import nn

from vpt_fast import VAPT, LinearProbe, MLPHead, PromptBank, VPTDeep, VPTShallow, prompt_tune
from vpt_fast.adapter.architecture import describe, different_architecture
from vpt_fast.adapter.files import read_config
from vpt_fast.adapter.fingerprint import fingerprint
from vpt_fast.adapter.fixed_image import fixed_image_outputs
from vpt_fast.adapter.load import load_adapter
from vpt_fast.adapter.save import save_adapter
from vpt_fast.backbones.of_adapter import backbone_of_adapter
from vpt_fast.methods import METHODS


def _each(part: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        for block in model.blocks:
            owner, _, name = part.rpartition(".")
            module = block.get_submodule(owner)
            new = change(getattr(module, name))
            if new is not None:
                setattr(module, name, new)

    return changed


def _rms(norm: nn.LayerNorm) -> nn.Module:
    new: Any = RmsNorm(norm.normalized_shape[0], eps=norm.eps)
    new.weight, new.bias = norm.weight, norm.bias  # as many weights, under the same names
    return new


def _more_heads(attn: Any) -> None:
    attn.num_heads, attn.head_dim = 2 * attn.num_heads, attn.head_dim // 2
    attn.scale = attn.head_dim**-0.5


# Changes that leave every weight as it was, and words of their refusals.
CHANGES: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "activation": (_each("mlp.act", lambda _: QuickGELU()), ["mlp.act is QuickGELU, not GELU"]),
    "its_form": (
        _each("mlp.act", lambda _: nn.GELU(approximate="tanh")),
        ["mlp.act.approximate is tanh, not none"],
    ),
    "heads": (_each("attn", _more_heads), ["num_heads is 4, not 2"]),
    "scale": (_each("attn.scale", lambda scale: scale * 2), ["attn.scale"]),
    "epsilon": (
        _each("norm1", lambda norm: setattr(norm, "eps", 1e-5)),
        ["norm1.eps is 1e-05, not 1e-06"],
    ),
    "norm": (_each("norm2", _rms), ["norm2 is RmsNorm, not LayerNorm"]),
    "one_block": (
        lambda model: setattr(model.blocks[1].mlp, "act", QuickGELU()),
        ["blocks.1.mlp.act is QuickGELU, not GELU"],
    ),
    "method": (
        lambda model: setattr(model.blocks[0].mlp, "forward", lambda x: 0.9 * x),
        ["of the same image", "features has other values"],
    ),
    "whole_model": (
        lambda model: setattr(model, "_pos_embed", lambda x: type(model)._pos_embed(model, 2 * x)),
        ["of the same image", "features has other values"],
    ),
    "patches": (
        lambda model: model.patch_embed.proj.register_forward_hook(lambda *_: 1.1 * _[2]),
        ["of the same image", "has other values"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_equal_weights_and_another_function(case: str, tmp_path: Path) -> None:
    adapter = save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter")
    change, words = CHANGES[case]
    model = plain()
    change(model)
    with pytest.raises(ValueError) as refusal:
        load_adapter(model, adapter)
    for word in words:
        assert word in str(refusal.value)
    assert type(model) is type(plain())


def test_a_bank_compares_it_too(tmp_path: Path) -> None:
    adapter = save(trained(TOKEN, VPTDeep(3)), tmp_path / "adapter")
    model = plain()
    CHANGES["activation"][0](model)
    with pytest.raises(ValueError, match=r"mlp.act is QuickGELU, not GELU.*vit_tiny_patch16_224"):
        PromptBank(model.eval()).add("a", adapter)


def test_clip_and_its_quick_gelu(tmp_path: Path) -> None:
    """Two models of timm's with the same tags and weights that differ in the activation only."""
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3}
    clip, quick = (
        timm.create_model(f"vit_base_patch16_clip_{quick}224", **small)
        for quick in ("", "quickgelu_")
    )
    quick.load_state_dict(clip.state_dict())
    adapter = save_adapter(prompt_tune(clip, VPTShallow(2)), tmp_path / "a", model_args=small)
    with pytest.raises(ValueError, match=r"is QuickGELU, not GELU.*vit_base_patch16_clip_224"):
        load_adapter(quick, adapter)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_changes_nothing_of_the_description(family: str) -> None:
    expected = describe(families.create(family))
    assert any(name.endswith("num_heads") for name in expected)
    for kind in METHODS.values():
        model = families.create(family)
        try:
            prompt_tune(model, kind())
        except ValueError:
            continue  # this method does not fit this family
        assert describe(model) == expected, kind.name


def test_attributes_of_the_user_are_ignored(tmp_path: Path) -> None:
    tuned: Any = trained(TOKEN, VPTDeep(2))
    tuned.experiment, tuned.fold = "one", 1
    adapter = save(tuned, tmp_path / "adapter")
    model: Any = plain()
    model.experiment, model.fold = "two", 2
    load_adapter(model, adapter)


def test_attributes_of_other_timm_versions_are_ignored() -> None:
    have = describe(plain())
    fewer = {key: value for key, value in have.items() if not key.endswith("area")}
    assert different_architecture(have, {**fewer, "blocks.*.attn.new": 3}) == ""
    assert "attn.scale" in different_architecture(have, {**have, "blocks.*.attn.scale": 3.0})


@pytest.mark.parametrize("method", [VPTDeep(2), VAPT(2), MLPHead(), LinearProbe()])
def test_the_fixed_image_changes_no_state(method: Any) -> None:
    model = trained(TOKEN, method)
    model.train()
    model.get_submodule("head").eval()
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    first, second = fixed_image_outputs(model), fixed_image_outputs(model)
    assert first == second and first is not None
    assert first["logits"]["norm"] > 0 and first["features"]["norm"] > 0
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.get_submodule("head")._forward_pre_hooks


def test_values_that_are_not_finite_are_not_compared(tmp_path: Path) -> None:
    model = trained(TOKEN, VPTDeep(2))
    model.get_submodule("norm").register_forward_hook(lambda *_: _[2] * float("inf"))
    adapter = save(model, tmp_path / "adapter")
    assert read_config(adapter)["fixed_image"] is None
    load_adapter(plain(), adapter)


def test_an_adapter_of_the_first_format(tmp_path: Path) -> None:
    """It has neither architecture nor fixed image nor checksum, and loads."""
    model = trained(TOKEN, VPTDeep(2))
    adapter = save(model, tmp_path / "adapter")

    def older(config: dict[str, Any]) -> None:
        for key in ("architecture", "fixed_image"):
            del config[key]
        del config["model"]["source"]
        config["format_version"] = 1

    rewrite_config(adapter, older)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["config_sha256"]
    path.write_text(json.dumps(config, indent=2))
    images = families.images(TOKEN, dtype=torch.float32)
    assert torch.equal(load_adapter(plain(), adapter)(images), model(images))


def _local_dir(folder: Path) -> tuple[str, nn.Module]:
    """Write a model to a folder as timm does; return its name and the model."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": args,
        "pretrained_cfg": {"num_classes": 7, "input_size": [3, 32, 32], "classifier": "head"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}", model


def test_a_backbone_from_a_folder_is_found_again(tmp_path: Path) -> None:
    name, _ = _local_dir(tmp_path / "mine")
    model = timm.create_model(name, pretrained=True, num_classes=3)
    adapter = save_adapter(prompt_tune(model, VPTDeep(2)), tmp_path / "adapter")
    config = read_config(adapter)
    assert config["model"]["source"] == name
    again = load_adapter(backbone_of_adapter(config), adapter).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model.eval()(images))


def test_a_backbone_from_the_hub_is_recorded(tmp_path: Path) -> None:
    model: Any = plain()
    model.pretrained_cfg = {**model.pretrained_cfg, "source": "hf-hub", "hf_hub_id": "me/vit@main"}
    adapter = save(prompt_tune(model, VPTDeep(2)), tmp_path / "adapter")
    assert read_config(adapter)["model"]["source"] == "hf-hub:me/vit@main"
    refuse(plain(seed=5), adapter, "hf-hub:me/vit@main")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    name, _ = _local_dir(tmp_path / "mine")
    model = timm.create_model(name, pretrained=True, num_classes=3)
    adapter = save_adapter(prompt_tune(model, VPTDeep(2)), tmp_path / "adapter")
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="mine"):
        backbone_of_adapter(read_config(adapter))
    weights = tmp_path / "moved" / "model.safetensors"
    load_adapter(backbone_of_adapter(read_config(adapter), weights), adapter)


def _rounded(model: Any, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def test_logits_that_are_near_zero_by_chance(tmp_path: Path) -> None:
    """Rounding changes the logit of a single class by more than its size."""
    torch.manual_seed(0)
    model: Any = prompt_tune(plain(num_classes=1), LinearProbe())
    seen: Any = fixed_image_outputs(model)
    with torch.no_grad():
        model.head.bias -= seen["logits"]["projection"] * float(_sign_of_one())
    seen = fixed_image_outputs(model)
    assert seen["logits"]["norm"] < 1e-5 * seen["scale"]
    adapter = save_adapter(model, tmp_path / "adapter")
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(plain(num_classes=1).to(dtype), adapter)
        load_adapter(_rounded(plain(num_classes=1), dtype), adapter)
    hooked: Any = plain(num_classes=1)
    hooked.head.register_forward_hook(lambda *_: _[2] + seen["scale"])
    with pytest.raises(ValueError, match="logits has other values"):
        load_adapter(hooked, adapter)


def _sign_of_one() -> float:
    return fingerprint({"one": torch.ones(1)})["one"]["projection"]


def test_a_deep_model_with_rounded_weights_loads(tmp_path: Path) -> None:
    """Rounding the weights to bfloat16 and back changes the features by hundredths."""

    def deep(seed: int) -> Any:
        torch.manual_seed(seed)
        model = plain(depth=12)
        return model

    for seed in range(4):
        adapter = save(prompt_tune(deep(seed), VPTDeep(2)), tmp_path / str(seed))
        load_adapter(_rounded(deep(seed), torch.bfloat16), adapter)


def test_weights_that_float16_hardly_resolves(tmp_path: Path) -> None:
    """timm initialises class tokens in the order of 1e-6."""
    model = plain()
    torch.nn.init.constant_(model.cls_token, 1.03e-6)
    other = plain().half()
    torch.nn.init.constant_(other.cls_token, 1.03e-6)
    assert other.cls_token.flatten()[0] == 17 * 2.0**-24
    load_adapter(other, save(prompt_tune(model, VPTDeep(2)), tmp_path / "adapter"))


@pytest.mark.parametrize("values", [{"pretrained": True}, {"init_values": float("nan")}])
def test_arguments_that_would_not_load_are_not_saved(
    values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"could not be loaded again: model.args.{[*values][0]}"):
        save_adapter(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter", model_args=values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saved", [False, True])
def test_dynamic_image_sizes_may_differ(saved: bool, tmp_path: Path) -> None:
    model = prompt_tune(plain(dynamic_img_size=saved), VPTDeep(2))
    adapter = save(model, tmp_path / "adapter")
    loaded: Any = load_adapter(plain(dynamic_img_size=not saved), adapter)
    image = families.images(TOKEN, dtype=torch.float32)
    assert torch.allclose(loaded.eval()(image), model.eval()(image), atol=1e-6)


def test_normalisation_from_numpy(tmp_path: Path) -> None:
    model: Any = prompt_tune(plain(), VPTDeep(2))
    values = tuple(np.float32([0.25, 0.5, 0.75]))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": values, "crop_pct": np.float32(0.5)}
    found = read_config(save(model, tmp_path / "adapter"))["input"]
    assert (found["mean"], found["crop_pct"]) == ([0.25, 0.5, 0.75], 0.5)
