"""Names, modes and flags of tuned models; copying, training and restoring them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import (
    VARIANTS,
    assert_same,
    distance,
    pair,
    prompt_names,
    redraw_prompts,
)
from support.unchanged import assert_unchanged, snapshot
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from vpt_fast import (
    LinearProbe,
    VPTDeep,
    VPTShallow,
    count_parameters,
    print_trainable_parameters,
    prompt_tune,
    remove_prompts,
    trainable_parameters,
)

SOME = ("linear", "shallow", "deep", "gaps", "shared", "projected", "shallow_projected")
FEW = (TOKEN, "deit_distilled", "siglip_map", "dinov2_registers")


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_names_and_shapes(family: str, variant: str) -> None:
    base, depth = families.build(family), families.depth(family)
    method = VARIANTS[variant](depth)
    plain = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    tuned = prompt_tune(base, method)
    found = {name: tuple(value.shape) for name, value in tuned.state_dict().items()}
    assert {name: found.get(name) for name in plain} == plain
    width, blocks = tuned.embed_dim, getattr(method, "blocks", None)
    if isinstance(method, VPTShallow):
        blocks = [0]
    wanted: dict[str, tuple[int, ...]] = {}
    for name in prompt_names(method, list(range(depth) if blocks is None else blocks)):
        if name == "prompt_projection.weight":
            wanted[name] = (width, method.project_dim)
        elif name == "prompt_projection.bias":
            wanted[name] = (width,)
        else:
            wanted[name] = (method.num_prompts, method.project_dim or width)
    assert {name: shape for name, shape in found.items() if name not in plain} == wanted


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", SOME)
def test_trained_parameters(family: str, variant: str) -> None:
    base = families.build(family)
    heads = {n for n, _ in base.named_parameters() if n.startswith(("head.", "head_dist."))}
    names, total = set(base.state_dict()), sum(p.numel() for p in base.parameters())
    tuned = prompt_tune(base, VARIANTS[variant](families.depth(family)))
    wanted = heads | (set(tuned.state_dict()) - names)
    parameters = dict(tuned.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == wanted
    listed = trainable_parameters(tuned)
    assert isinstance(listed, list)
    assert {name for name, _ in listed} == wanted
    assert len(listed) == len(wanted)
    assert all(p is parameters[name] for name, p in listed)
    trained = sum(parameters[name].numel() for name in wanted)
    prompts = trained - sum(parameters[name].numel() for name in heads)
    assert count_parameters(tuned) == (trained, total + prompts)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = prompt_tune(families.build(TOKEN), VPTDeep(10))
    print_trainable_parameters(tuned)
    printed = capsys.readouterr().out.replace(",", "").replace("_", "")
    trained, total = count_parameters(tuned)
    assert str(trained) in printed
    assert str(total) in printed
    assert f"{100 * trained / total:.1f}"[:3] in printed


@pytest.mark.parametrize(("p", "count"), [(1, 9_216), (10, 92_160), (50, 460_800), (100, 921_600)])
def test_published_parameter_counts(p: int, count: int) -> None:
    """VPT-Deep on ViT-B/16 at 224 px, prompts without the head."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = 10 * 768 + 10
    assert count_parameters(prompt_tune(model, VPTDeep(p))) == (count + head, total + count)


@pytest.mark.parametrize("variant", SOME)
def test_modes(variant: str) -> None:
    tuned = prompt_tune(families.build(TOKEN), VARIANTS[variant](4))
    for mode in (True, False, True):
        assert tuned.train(mode) is tuned
        assert tuned.training is mode
        for name, module in tuned.named_modules():
            if name == "head" or "prompt" in name:
                assert module.training is mode, f"{name}.training is {module.training}"
            elif name not in ("", "head_drop"):
                assert not module.training, f"{name} is in training mode"
    assert not tuned.eval().head.training


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", SOME)
def test_remove_prompts_restores_everything(family: str, variant: str) -> None:
    base, image = families.build(family), families.images(family)
    base.train()
    base.blocks[1].eval()
    base.patch_embed.requires_grad_(False)
    base.blocks[0].mlp.fc1.bias.requires_grad_(False)
    before = snapshot(base)
    tuned = prompt_tune(base, VARIANTS[variant](families.depth(family)))
    tuned.train()
    output = tuned(image)
    output.square().sum().backward()
    tuned.eval()
    restored = remove_prompts(tuned)
    assert restored is base
    assert_unchanged(base, before)
    assert not any("vpt_fast" in type(m).__module__ for m in base.modules())
    fresh = families.build(family)
    assert torch.equal(base.eval()(image), fresh(image))
    assert variant == "linear" or distance(output, fresh(image)) > 0
    base.set_grad_checkpointing(True)
    again, plain = pair(base, VPTDeep(2))
    assert_same(again, plain, again.train()(image), plain(image))


def test_remove_prompts_needs_prompts() -> None:
    model = families.build(TOKEN)
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="VisionTransformer"):
        remove_prompts(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("first", ["linear", "shallow", "deep"])
@pytest.mark.parametrize("second", ["linear", "shallow", "deep"])
def test_tuning_twice_is_refused(first: str, second: str) -> None:
    tuned, plain = pair(families.build(TOKEN), VARIANTS[first](4))
    before, image = snapshot(tuned), families.images(TOKEN)
    with pytest.raises((TypeError, ValueError), match="remove_prompts"):
        prompt_tune(tuned, VARIANTS[second](4))
    assert_unchanged(tuned, before)
    assert_same(tuned, plain, tuned(image), plain(image))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("variant", SOME)
def test_copies(duplicate: Any, variant: str) -> None:
    """A copy computes the same bits, trains independently, has the same modes, can be restored."""
    tuned, plain = pair(families.build(TOKEN), VARIANTS[variant](4))
    image = families.images(TOKEN)
    tuned(image).sum().backward()
    twin = duplicate(tuned)
    assert [type(m) for m in twin.modules()] == [type(m) for m in tuned.modules()]
    assert torch.equal(twin(image), tuned(image))
    assert_same(twin.train(), plain, twin(image), plain(image))
    assert not twin.blocks.training
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    redraw_prompts(twin)
    assert {type(m) for m in remove_prompts(twin).modules()} == {
        type(m) for m in families.build(TOKEN).modules()
    }


@pytest.mark.parametrize("variant", SOME)
def test_state_dicts_load(variant: str) -> None:
    """Its own state loads strictly; a plain timm checkpoint loads and leaves the prompts alone."""
    method, image = VARIANTS[variant](4), families.images(TOKEN)
    tuned, plain = pair(families.build(TOKEN), method)
    other = prompt_tune(families.build(TOKEN, seed=3), method)
    other.load_state_dict(tuned.state_dict(), strict=True)
    assert torch.equal(other(image), tuned(image))
    third = prompt_tune(families.build(TOKEN, seed=3), method)
    redraw_prompts(third)
    found = third.load_state_dict(families.build(TOKEN).state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) <= set(prompt_names(method, plain.blocks))
    assert distance(third(image), plain(image)) <= 1e-10
    with pytest.raises(RuntimeError, match="Missing key.*norm.weight"):
        third.load_state_dict(
            {k: v for k, v in tuned.state_dict().items() if k != "norm.weight"}, strict=True
        )


@pytest.mark.parametrize("variant", ["shallow", "deep", "shared", "projected_shared_gaps"])
def test_plain_checkpoint_loads_strictly(variant: str) -> None:
    tuned = prompt_tune(families.build(TOKEN, seed=3), VARIANTS[variant](4))
    before = {n: v.clone() for n, v in tuned.state_dict().items() if "prompt" in n}
    weights = families.build(TOKEN).state_dict()
    tuned.load_state_dict(weights, strict=True)
    after = tuned.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in weights.items())


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("variant", SOME)
def test_a_step_changes_prompts_and_head_only(variant: str, optimiser: Any) -> None:
    """Even if the optimiser gets all parameters, with weight decay."""
    tuned, _ = pair(families.build(AVERAGE), VARIANTS[variant](3))
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    step = optimiser(tuned.parameters(), lr=0.1, weight_decay=0.1)
    tuned.train()
    tuned(families.images(AVERAGE)).square().sum().backward()
    step.step()
    changed = {n for n, v in tuned.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {name for name, _ in trainable_parameters(tuned)}


def _uniform(values: Tensor, bound: float) -> None:
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.98 * bound
    assert values.mean().abs() < 0.06 * bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.04)


@pytest.mark.parametrize(
    ("family", "patch"), [(TOKEN, (8, 8)), ("vit_oblong", (8, 10)), ("vit_grey", (8, 8))]
)
def test_initialisation(family: str, patch: tuple[int, int]) -> None:
    """Prompts of each block are drawn from U(-v, v), v = sqrt(6 / (3 patch_h patch_w + D))."""
    torch.manual_seed(0)
    bound = math.sqrt(6 / (3 * patch[0] * patch[1] + 64))
    deep = prompt_tune(families.build(family), VPTDeep(50)).state_dict()
    tokens = [value for name, value in deep.items() if "prompt" in name]
    assert len(tokens) == families.depth(family)
    for value in tokens:
        _uniform(value, bound)
    assert not torch.equal(tokens[0], tokens[1])
    for method in (VPTShallow(50), VPTDeep(50, shared=True)):
        state = prompt_tune(families.build(family), method).state_dict()
        (value,) = [value for name, value in state.items() if "prompt" in name]
        _uniform(value, bound)


def test_initialisation_of_a_projection() -> None:
    """v comes from the projected width; the projection is kaiming-normal over its fan-out."""
    torch.manual_seed(0)
    state = prompt_tune(families.build(TOKEN), VPTDeep(100, project_dim=24)).state_dict()
    for index in range(4):
        _uniform(state[f"blocks.{index}.prompt.tokens"], math.sqrt(6 / (3 * 64 + 24)))
    weight = state["prompt_projection.weight"]
    assert weight.std() == pytest.approx(math.sqrt(2 / 64), rel=0.06)
    assert weight.mean().abs() < 0.02
    assert weight.abs().max() > 2.5 * math.sqrt(2 / 64)


def test_initialisation_follows_the_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(prompt_tune(families.build(TOKEN), VPTDeep(3)).state_dict())
    name = "blocks.1.prompt.tokens"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("method", [LinearProbe(), VPTDeep(2)])
def test_layer_decay_groups(method: Any) -> None:
    """timm's optimiser groups cover every trained parameter once."""
    tuned = prompt_tune(families.build(TOKEN), method)
    groups = param_groups_layer_decay(tuned, weight_decay=0.1, layer_decay=0.7)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for _, p in trainable_parameters(tuned))
