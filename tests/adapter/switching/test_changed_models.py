"""Several adapters on a model that is changed between switches, or that cannot be switched."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support.cases import build, images
from support.formulations.plain import distance
from support.unchanged import assert_unchanged, snapshot
from test_switching import logits, tuned, values_redrawn
from torch import nn
from torch.fx import symbolic_trace

import vpt_fast
from vpt_fast import VAPT, BiasTuning, FullTuning, LinearProbe, PartialTuning, VPTDeep

X = images("vit")


def two(first: Any, second: Any) -> Any:
    """Return a model with two adapters of other values; the first one is active."""
    model = tuned("vit", first)
    vpt_fast.add_adapter(model, "other", second)
    values_redrawn(vpt_fast.set_adapter(model, "other"))
    return vpt_fast.set_adapter(model, "default")


def around(model: Any) -> Any:
    """Switch to the other adapter and back."""
    return vpt_fast.set_adapter(vpt_fast.set_adapter(model, "other"), "default")


def loaded(model: Any) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model: Any) -> None:
    model.blocks[0].mlp.fc1.bias = nn.Parameter(model.blocks[0].mlp.fc1.bias + 1, False)


@pytest.mark.parametrize("change", [loaded, replaced])
@pytest.mark.parametrize("second", [BiasTuning(), FullTuning()], ids=repr)
def test_the_base_model_is_what_the_model_has_now(change: Any, second: Any) -> None:
    model = two(VPTDeep(2), second)
    change(model)
    expected = logits(model, X)
    assert torch.equal(logits(around(model), X), expected)
    vpt_fast.add_adapter(model, "third", second)
    assert torch.equal(logits(model, X), expected)


def test_a_state_that_is_loaded_while_folded() -> None:
    model = two(VPTDeep(2), BiasTuning())
    vpt_fast.fold_backbone(model)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    expected = logits(model, X)
    vpt_fast.add_adapter(model, "third", BiasTuning())
    assert distance(logits(model, X), expected) <= 1e-10


def test_the_active_ones_own_weights_are_not_left_folded() -> None:
    model = two(BiasTuning(), VPTDeep(2))
    vpt_fast.fold_backbone(model.requires_grad_(False))
    with pytest.raises(ValueError, match="folded, and adapter 'other' or the active one trains"):
        vpt_fast.set_adapter(model, "other")


def test_hooks_on_the_classifier() -> None:
    plain = build("vit").eval()
    plain.head.register_forward_hook(lambda module, inputs, output: output * 10)
    base = logits(plain, X)
    model = values_redrawn(vpt_fast.prompt_tune(plain, VPTDeep(2)))
    with vpt_fast.disabled(model):
        assert torch.equal(logits(model, X), base)
    vpt_fast.add_adapter(model, "other", LinearProbe())
    assert distance(logits(vpt_fast.set_adapter(model, "other"), X), base) <= 1e-10
    other = vpt_fast.prompt_tune(build("vit"), VPTDeep(2))
    forward = other.head.forward
    other.head.forward = lambda x: forward(x) * 2
    with pytest.raises(ValueError, match="a Linear, has a forward of its own on the instance"):
        vpt_fast.add_adapter(other, "other", LinearProbe())


@pytest.mark.parametrize("overwrite", [False, True])
def test_conversions_reach_every_adapter(overwrite: bool) -> None:
    model = two(VPTDeep(2), BiasTuning())
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    for name in ("other", "default", "other"):
        vpt_fast.set_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_models_on_the_meta_device_that_are_filled_later() -> None:
    with torch.device("meta"):
        model = vpt_fast.prompt_tune(build("vit").to("meta"), VPTDeep(2))
    vpt_fast.add_adapter(model, "other", BiasTuning())
    model.to_empty(device="cpu")
    for name in ("other", "default", "other"):
        vpt_fast.set_adapter(model, name)
        assert not any(p.is_meta for p in model.parameters())
    later = vpt_fast.prompt_tune(build("vit").to("meta"), FullTuning()).to_empty(device="cpu")
    with torch.no_grad():
        later.load_state_dict(build("vit").state_dict())
    vpt_fast.add_adapter(later, "other", VPTDeep(2))
    with vpt_fast.disabled(later.eval()):
        assert torch.equal(logits(later, X), logits(build("vit").eval(), X))


def test_graphs_of_an_adapter_that_is_not_active() -> None:
    model = two(VAPT(2), VAPT(2))
    expected, graph = logits(model, X), symbolic_trace(model)
    assert distance(logits(graph, X), expected) <= 1e-10
    vpt_fast.set_adapter(model, "other")
    with pytest.raises(ValueError, match="traced with an adapter that is not active now"):
        graph(X)
    vpt_fast.set_adapter(model, "default")
    for again in (symbolic_trace(graph), pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        assert distance(logits(again, X), expected) <= 1e-10


def test_the_order_of_removal_on_a_shared_backbone() -> None:
    first: Any = build("vit")
    second = copy.deepcopy(first)
    for (_, mine), (_, other) in zip(first.named_modules(), second.named_modules(), strict=True):
        for name in mine._parameters:
            other._parameters[name] = mine._parameters[name]
    second.head = copy.deepcopy(first.head)
    vpt_fast.prompt_tune(first, VPTDeep(2)), vpt_fast.prompt_tune(second, VPTDeep(2))
    trained = [name for name, _ in vpt_fast.trainable_parameters(second)]
    vpt_fast.add_adapter(first, "other", VPTDeep(2))
    with pytest.raises(ValueError, match="tuned after"):
        vpt_fast.remove_prompts(first)
    assert [name for name, _ in vpt_fast.trainable_parameters(second)] == trained
    vpt_fast.remove_prompts(second)
    vpt_fast.remove_prompts(first)


def test_flags_and_modes_come_back() -> None:
    model = two(VPTDeep(2), VPTDeep(2)).train()
    model.head.eval(), model.blocks[0].prompt.eval()
    before = snapshot(model)
    with vpt_fast.disabled(model):
        model.requires_grad_(True)
        model.blocks[0].train()
    assert_unchanged(model, before)
    with pytest.raises(FileNotFoundError):
        vpt_fast.add_adapter(model, "third", "nowhere")
    assert_unchanged(model, before)
    with vpt_fast.disabled(model):
        model.eval()
    assert not any(module.training for module in model.modules())


def pruned(model: Any) -> None:
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)


def without_norm(model: Any) -> None:
    model.norm = nn.Identity()


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    model.requires_grad_(False)
    for name in ("prompt", "head"):
        for own, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in own)


@pytest.mark.parametrize("change", [pruned, without_norm, parametrized])
def test_a_switch_is_whole_or_not_at_all(change: Any) -> None:
    model = two(VPTDeep(2), FullTuning())
    change(model)
    expected = logits(model, X)
    before = snapshot(model)
    with pytest.raises(ValueError, match="which is not in the model any more; put back"):
        vpt_fast.set_adapter(model, "other")
    assert_unchanged(model, before)
    assert vpt_fast.adapter_names(model) == ["default", "other"]
    assert torch.equal(logits(model, X), expected)
    active = two(FullTuning(), VPTDeep(2))
    if change is not parametrized:
        change(active)
        with pytest.raises(ValueError, match="which is not in the model any more"):
            vpt_fast.set_adapter(active, "other")
        assert vpt_fast.active_adapter(active) == "default"


def test_a_pruned_model_with_prompts_only() -> None:
    """The new last block of every adapter strips its prompt rows."""
    method = vpt_fast.VPTShallow(2)
    model = two(VPTDeep(2), method)
    pruned(model)
    expected = build("vit")
    vpt_fast.prompt_tune(expected, method).eval()
    pruned(expected)
    vpt_fast.set_adapter(model, "other")
    expected.load_state_dict(model.state_dict())
    assert distance(logits(model, X), logits(expected, X)) <= 1e-10
    assert model.forward_features(X).shape == expected.forward_features(X).shape


def test_a_backbone_that_cannot_be_folded_again() -> None:
    model = two(VPTDeep(2), VPTDeep(2))
    expected = logits(model, X)
    vpt_fast.fold_backbone(model)
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="not folded any more: cannot fold blocks.0.attn.qkv"):
        vpt_fast.add_adapter(model, "third", VPTDeep(2))
    assert vpt_fast.adapter_names(model) == ["default", "other", "third"]
    assert model.tune_record.fold is None and distance(logits(model, X), expected) <= 1e-10
    with pytest.raises(KeyError, match="mine"), vpt_fast.disabled(model):
        raise KeyError("mine")


@pytest.mark.parametrize("folded", [False, True])
def test_the_base_model_in_inference_mode(folded: bool) -> None:
    model = tuned("vit", VPTDeep(2) if folded else BiasTuning())
    if folded:
        vpt_fast.fold_backbone(model)
    with torch.inference_mode(), vpt_fast.disabled(model):
        model(X)
    vpt_fast.add_adapter(model, "other", VPTDeep(2))
    vpt_fast.set_adapter(model, "other").train()
    model(X).sum().backward()
    assert float(model.blocks[0].prompt.tokens.grad.abs().sum()) > 0


def test_what_happens_to_a_disabled_model() -> None:
    model = two(VPTDeep(2), BiasTuning())
    with vpt_fast.disabled(model):
        model.float()
        copied = copy.deepcopy(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(around(model), X.float()).dtype == torch.float32
    assert logits(vpt_fast.prompt_tune(copied, VPTDeep(2)), X.float()).dtype == torch.float32


def test_models_without_a_classifier(tmp_path: Any) -> None:
    bare: Any = build("vit")
    bare.reset_classifier(0)
    features = vpt_fast.prompt_tune(bare, VPTDeep(2)).eval()
    vpt_fast.save_adapter(features, tmp_path / "features")
    model = tuned("vit", VPTDeep(2))
    vpt_fast.add_adapter(model, "features", tmp_path / "features")
    vpt_fast.set_adapter(model, "features")
    assert torch.equal(logits(model, X), logits(features, X))
    features.reset_classifier(3)
    vpt_fast.add_adapter(features, "other", VPTDeep(2))
    with vpt_fast.disabled(features):
        assert logits(features, X).shape == (len(X), 16)
    assert logits(features, X).shape == (len(X), 3)


def test_removal_whatever_is_unfrozen() -> None:
    model = two(VPTDeep(2), VPTDeep(2))
    vpt_fast.set_adapter(model, "other")
    model.pos_embed.requires_grad_(True)
    assert torch.equal(
        logits(vpt_fast.remove_prompts(model).eval(), X), logits(build("vit").eval(), X)
    )


def test_tied_parameters_and_modules_of_the_users_own() -> None:
    plain: Any = build("vit")
    plain.blocks[1].norm1.weight = plain.blocks[0].norm1.weight
    base = logits(plain.eval(), X)
    model = values_redrawn(vpt_fast.prompt_tune(plain, VPTDeep(2)))
    model.aux = nn.Linear(2, 2)  # trained beside, and shared
    vpt_fast.add_adapter(model, "other", FullTuning())
    vpt_fast.set_adapter(model, "other")
    assert model.blocks[1].norm1.weight is model.blocks[0].norm1.weight
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(2)
    with vpt_fast.disabled(model):
        assert torch.equal(logits(model, X), base)
        assert model.blocks[1].norm1.weight is model.blocks[0].norm1.weight


def test_names_that_users_give() -> None:
    plain: Any = build("vit")
    plain.adapters = "mine"
    model = vpt_fast.prompt_tune(plain, VPTDeep(2))
    vpt_fast.add_adapter(model, "other", VPTDeep(2))
    assert model.adapters == "mine" and vpt_fast.active_adapter(model) == "default"
    with pytest.raises(TypeError, match="name is \\['a'\\]"):
        vpt_fast.set_adapter(model, ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [VPTDeep(2), PartialTuning(1)], ids=repr)
def test_running_means_of_a_classifier_are_saved(method: Any, tmp_path: Any) -> None:
    def plain() -> Any:
        model: Any = build("vit")
        torch.manual_seed(0)
        model.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5)).double()
        return model

    model = vpt_fast.prompt_tune(plain(), method).train()
    model(X).square().sum().backward()
    expected = logits(model.eval(), X)
    assert float(model.head[0].running_mean.abs().sum()) > 0
    vpt_fast.save_adapter(model, tmp_path / "a")
    again = vpt_fast.load_adapter(plain(), tmp_path / "a").eval()
    assert torch.equal(logits(again, X), expected)
    fresh = logits(plain().eval(), X)
    assert torch.equal(logits(vpt_fast.remove_prompts(again).eval(), X), fresh)


def test_adding_and_deleting_keeps_nothing() -> None:
    model = two(VPTDeep(2), VPTDeep(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            vpt_fast.add_adapter(model, "third", VAPT(2))
            vpt_fast.delete_adapter(model, "third")
    assert vpt_fast.adapter_names(model) == ["default", "other"]
