"""Baselines are refused before anything changes, removed bit for bit, saved, loaded, trained."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain_baselines import BASELINES, baseline_pair, redraw_added
from torch import nn

from vpt_fast import (
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
    trainable_parameters,
)
from vpt_fast.adapter.files import read_config
from vpt_fast.analysis import attention_shares
from vpt_fast.analysis.activation_memory import provided
from vpt_fast.methods import METHODS, from_dict, to_dict
from vpt_fast.reference.vit import concatenated
from vpt_fast.train.common.recipe import HEAD_BIAS, Recipe, head_layers, init_head, make_optimizer

SCALED = "dinov2_registers"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that `remove_prompts` restores."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values, expected = after.pop("values"), before["values"]
    assert after == {key: value for key, value in before.items() if key != "values"}
    assert list(values) == list(expected)
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def shift_trained(model: nn.Module) -> None:
    """Change every trained value, as training would."""
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.mul_(1.25).add_(0.125)


@pytest.mark.parametrize("method", BASELINES)
def test_removing_restores_every_bit(method: str) -> None:
    model = families.build(SCALED, dtype=torch.float32)
    model.train()
    model.blocks[0].eval()
    model.blocks[1].norm1.requires_grad_(False)
    before = snapshot(model)
    tuned = prompt_tune(model, BASELINES[method])
    shift_trained(tuned)
    assert remove_prompts(tuned) is model
    assert_unchanged(model, before)


def test_originals_are_in_host_memory() -> None:
    tuned = prompt_tune(families.build(TOKEN), FullTuning())
    kept = tuned.tune_record.originals
    assert set(kept) == {name for name, _ in tuned.named_parameters()}
    assert {tensor.device.type for tensor in kept.values()} == {"cpu"}
    owned = {p.data_ptr() for p in tuned.parameters()}
    assert not owned & {tensor.data_ptr() for tensor in kept.values()}


@pytest.mark.parametrize("method", BASELINES)
def test_saved_and_loaded_bit_for_bit(method: str, tmp_path: Path) -> None:
    tuned = prompt_tune(families.build(SCALED, dtype=torch.float32), BASELINES[method])
    redraw_added(tuned)
    shift_trained(tuned)
    arguments = families.FAMILIES[SCALED].arguments
    directory = save_adapter(tuned, tmp_path / "adapter", model_args=arguments)
    stored = load_file(directory / "adapter_model.safetensors")
    assert set(stored) == {name for name, _ in trainable_parameters(tuned)}
    config = read_config(directory)
    assert from_dict(config["method"]) == BASELINES[method]
    assert not set(config["fingerprint"]) & set(stored)

    plain = families.build(SCALED, dtype=torch.float32)
    before = snapshot(plain)
    loaded = load_adapter(plain, directory)
    image = families.images(SCALED, dtype=torch.float32)
    assert torch.equal(loaded.eval()(image), tuned.eval()(image))
    flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    assert_unchanged(remove_prompts(loaded), before)


@pytest.mark.parametrize("method", [name for name in BASELINES if name != "full"])
def test_another_backbone_differs_in_frozen_weights(method: str, tmp_path: Path) -> None:
    directory = save_adapter(prompt_tune(families.build(TOKEN), BASELINES[method]), tmp_path / "a")
    other = families.build(TOKEN, seed=3)
    before = snapshot(other)
    with pytest.raises(ValueError, match="another backbone"):
        load_adapter(other, directory)
    assert_unchanged(other, before)


def test_an_adapter_of_all_weights_fits_any_backbone_of_its_shape(tmp_path: Path) -> None:
    tuned = prompt_tune(families.build(TOKEN), FullTuning()).eval()
    directory = save_adapter(tuned, tmp_path / "adapter")
    assert read_config(directory)["fingerprint"] == {}
    loaded = load_adapter(families.build(TOKEN, seed=3), directory).eval()
    image = families.images(TOKEN)
    assert torch.equal(loaded(image), tuned(image))
    for family in ("vit_oblong", "mae"):  # other depth; other tensors
        with pytest.raises(ValueError, match=r"another model|has no|has shape"):
            load_adapter(families.build(family, num_classes=5), directory)


@pytest.mark.parametrize("method", BASELINES)
def test_copies_pickles_and_plain_checkpoints(method: str) -> None:
    tuned, _ = baseline_pair(families.build(TOKEN), BASELINES[method])
    image = families.images(TOKEN)
    expected = tuned(image)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(other(image), expected)
    state = families.build(TOKEN, seed=5).state_dict()
    if method == "mlp-wide":  # its last layer is narrower than the checkpoint's
        state["head.weight"] = tuned.head.weight.detach()
    tuned.load_state_dict(state, strict=True)
    assert torch.equal(tuned.blocks[0].norm1.weight, state["blocks.0.norm1.weight"])


@pytest.mark.parametrize("method", [MLPHead(), MLPHead(2, hidden_dim=17)], ids=repr)
def test_the_last_layer_of_an_mlp_head_is_timm_s_classifier(method: MLPHead) -> None:
    tuned = prompt_tune(families.build(TOKEN), method)
    assert head_layers(tuned) == [tuned.head]
    width = method.hidden_dim or 64
    hidden = copy.deepcopy(tuned.head_hidden.state_dict())
    init_head(tuned)
    assert (tuned.head.bias == HEAD_BIAS).all()
    assert all(torch.equal(v, hidden[n]) for n, v in tuned.head_hidden.state_dict().items())
    tuned.reset_classifier(7)
    image = families.images(TOKEN)
    assert tuned.head.in_features == width
    assert tuned(image).shape == (2, 7)
    features = tuned.forward_head(tuned.forward_features(image), pre_logits=True)
    tuned.reset_classifier(0)
    assert torch.allclose(tuned(image), features)
    tuned.reset_classifier(7)
    plain = remove_prompts(tuned)
    assert plain(image).shape == (2, 7)
    assert (plain.head.in_features, plain.head.weight.dtype) == (64, torch.float64)


def token() -> nn.Module:
    return families.build(TOKEN)


def without_biases() -> nn.Module:
    model = families.build(TOKEN)
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter) and module is not model.head:
            module.bias = None
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[str]]] = {
    "no_block": (token, lambda: PartialTuning(0), ["0"]),
    "too_deep": (token, lambda: PartialTuning(5), ["num_blocks=5", "4 blocks"]),
    "half_a_block": (token, lambda: PartialTuning(1.5), ["num_blocks", "1.5"]),
    "no_reduction": (token, lambda: AdapterTuning(0), ["reduction", "0"]),
    "negative": (token, lambda: AdapterTuning(-8), ["reduction", "-8"]),
    "too_narrow": (token, lambda: AdapterTuning(65), ["reduction=65", "64"]),
    "true": (token, lambda: AdapterTuning(True), ["reduction", "True"]),
    "one_layer": (token, lambda: MLPHead(1), ["num_layers", "1"]),
    "no_width": (token, lambda: MLPHead(hidden_dim=0), ["hidden_dim", "0"]),
    "two_heads": (lambda: families.build("deit_distilled"), MLPHead, ["head_dist"]),
    "no_head": (lambda: families.build("headless"), MLPHead, ["head", "num_classes"]),
    "no_bias": (without_biases, BiasTuning, ["no bias"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    build, method, named = REFUSED[case]
    model = build()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)) as refusal:
        prompt_tune(model, method())
    for word in named:
        assert word in str(refusal.value)
    assert_unchanged(model, before)


def test_bounds_are_accepted() -> None:
    """The values next to the refused ones are accepted."""
    for method in (PartialTuning(4), AdapterTuning(64), MLPHead(2, hidden_dim=1)):
        prompt_tune(families.build(TOKEN), method)


@pytest.mark.parametrize("method", [m for n, m in BASELINES.items() if n != "linear"], ids=repr)
def test_functions_for_prompts_refuse_baselines_by_name(method: Any) -> None:
    model = families.build(TOKEN)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'{method.name}' has no prompts"):
        concatenated(model, method)
    with pytest.raises(ValueError, match=f"'{method.name}' has no prompts"):  # noqa: SIM117
        with provided(model, method, "speed"):
            pass
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=f"'{method.name}' has no prompts to inspect"):
        attention_shares(prompt_tune(model, method), families.images(TOKEN))


def test_names_and_plain_forms() -> None:
    for method in (*BASELINES.values(), MLPHead(5, 32), AdapterTuning(64), PartialTuning(3)):
        assert METHODS[method.name] is type(method)
        assert from_dict(to_dict(method)) == method
    names = {"linear", "mlp-head", "partial", "bias", "adapter", "full"}
    assert {m.name for m in BASELINES.values()} == names


@pytest.mark.parametrize("method", BASELINES)
def test_a_few_steps_lower_the_loss(method: str) -> None:
    torch.manual_seed(0)
    model = prompt_tune(
        timm.create_model("test_vit", num_classes=4, img_size=32), BASELINES[method]
    )
    init_head(model)
    recipe = Recipe(epochs=10, batch_size=256, lr=1e-3, opt="adamw")
    optimizer = make_optimizer(model, recipe)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in trainable_parameters(model)}
    model.train()
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(not torch.equal(parameters[name], value) for name, value in trained.items())


def test_a_linear_probe_trains_the_least() -> None:
    """Every baseline trains the classifier, and all except a linear probe train more."""
    head = {"head.weight", "head.bias"}
    for method in BASELINES.values():
        names = {n for n, _ in trainable_parameters(prompt_tune(families.build(TOKEN), method))}
        assert names >= head
        assert (names == head) == isinstance(method, LinearProbe)
