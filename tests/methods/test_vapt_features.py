"""Features, hooks, modes, copies and adapters of VAPT models work as timm's do."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import assert_same, distance, redraw_prompts
from support.formulations.plain_vapt import (
    ACTING,
    PlainVAPT,
    compare,
    prompt_names,
    seeded,
    vapt_pair,
)
from support.unchanged import assert_alike, assert_unchanged, snapshot
from torch import Tensor, nn

from vpt_fast import (
    VAPT,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
    trainable_parameters,
)

FEW = (TOKEN, "deit_distilled", "siglip_map", "dinov2_registers")
BOTH = ("code", "paper")


def tune(family: str, variant: str = "code") -> tuple[nn.Module, PlainVAPT, Tensor]:
    tuned, plain = vapt_pair(families.build(family), VAPT(3, variant=variant, **ACTING))
    return tuned.eval(), plain, families.images(family)


@pytest.mark.parametrize("family", FEW)
def test_features_and_head(family: str) -> None:
    tuned, plain, image = tune(family)
    expected = plain.features(image)
    found = tuned.forward_features(image)
    assert distance(found, expected) <= 1e-10
    for pre_logits in (False, True):
        head = tuned.forward_head(found, pre_logits=pre_logits)
        assert distance(head, plain.model.forward_head(expected, pre_logits=pre_logits)) <= 1e-10
    plain.training = True
    output = tuned.forward_head(seeded(tuned.train().forward_features, image))
    assert_same(tuned, plain, output, seeded(plain, image))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", BOTH)
def test_forward_intermediates(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    names = ("return_prefix_tokens", "norm", "stop_early", "output_fmt", "output_dict")
    values = [(False, True)] * 3 + [("NCHW", "NLC"), (False, True)]
    with torch.no_grad():
        timms = plain.playback(image)
        for number, chosen in enumerate(itertools.product(*values)):
            options = dict(zip(names, chosen, strict=True))
            indices = ([0], [1, 2], None)[number % 3]
            expected = timms.forward_intermediates(image, indices, **options)
            assert_alike(tuned.forward_intermediates(image, indices, **options), expected)
        only = tuned.forward_intermediates(image, [1], intermediates_only=True)
        assert_alike(only, timms.forward_intermediates(image, [1], intermediates_only=True))


@pytest.mark.parametrize("family", FEW)
def test_get_intermediate_layers(family: str) -> None:
    tuned, plain, image = tune(family)
    with torch.no_grad():
        timms = plain.playback(image)
        for n, reshape, prefix, norm in itertools.product((1, [0, 2]), *[(False, True)] * 3):
            options = {"n": n, "reshape": reshape, "return_prefix_tokens": prefix, "norm": norm}
            assert_alike(
                tuned.get_intermediate_layers(image, **options),
                timms.get_intermediate_layers(image, **options),
            )


def test_gradients_through_intermediates() -> None:
    tuned, plain, image = tune(TOKEN)
    names = [name for name in plain.trained if "prompt" in name]
    parameters = dict(tuned.named_parameters())
    last = tuned.forward_intermediates(image, intermediates_only=True)
    ours = torch.autograd.grad(sum(y.sin().sum() for y in last), [parameters[n] for n in names])
    last = plain.playback(image).forward_intermediates(image, intermediates_only=True)
    right = torch.autograd.grad(sum(y.sin().sum() for y in last), [plain.trained[n] for n in names])
    for name, one, other in zip(names, ours, right, strict=True):
        assert distance(one, other) <= 1e-10, name


@pytest.mark.parametrize("last", [0, 1])
def test_prune_intermediate_layers(last: int) -> None:
    tuned, plain, image = tune(TOKEN)
    with torch.no_grad():
        timms = plain.playback(image)
        assert tuned.prune_intermediate_layers([last]) == timms.prune_intermediate_layers([last])
        assert distance(tuned.forward_features(image), timms.forward_features(image)) <= 1e-10
        assert distance(tuned(image), timms(image)) <= 1e-10


def _masks(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(tokens, tokens, generator=generator) > 0.4
    each = torch.rand(2, 1, tokens, tokens, generator=generator) > 0.4
    own = torch.eye(tokens, dtype=torch.bool)
    bias = torch.randn(2, 2, tokens, tokens, generator=generator, dtype=torch.float64)
    return {"shared": seen | own, "per_image": each | own, "bias": bias}


@pytest.mark.parametrize("kind", ["shared", "per_image", "bias"])
@pytest.mark.parametrize("variant", BOTH)
def test_attention_mask(kind: str, variant: str) -> None:
    """The mask is over tokens; all tokens read the prompts."""
    tuned, plain, image = tune(TOKEN, variant)
    mask = _masks(10)[kind]
    assert distance(plain(image), plain(image, mask)) > 1e-3
    plain.training = True
    expected = seeded(plain, image, mask)
    assert_same(tuned.train(), plain, seeded(tuned, image, mask), expected)
    found = seeded(lambda: tuned.forward_features(image, attn_mask=mask))
    assert distance(found, seeded(plain.features, image, mask)) <= 1e-10


@pytest.mark.parametrize("family", [TOKEN, "siglip_map"])
@pytest.mark.parametrize("variant", BOTH)
def test_checkpointing_replays_every_mask(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    tuned.train().set_grad_checkpointing(True)
    plain.training = True
    output = seeded(tuned, image)
    torch.rand(3)  # other draws in between must not matter
    assert_same(tuned, plain, output, seeded(plain, image))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_on_blocks(checkpointing: bool) -> None:
    """Blocks pass what timm's blocks pass, and with a hook the last block computes all rows."""
    tuned, plain, image = tune(TOKEN)
    tuned.set_grad_checkpointing(checkpointing)
    left: dict[int, Tensor] = {}
    ours: list[Tensor] = []
    for index, block in enumerate(tuned.blocks):
        block.register_forward_hook(
            lambda _module, _inputs, output, index=index: left.update({index: output.detach()})
        )
    if not checkpointing:
        tuned.blocks[1].register_full_backward_hook(lambda _m, _i, output: ours.append(output[0]))
    output = tuned(image)
    for index, expected in enumerate(plain.block_outputs(image)):
        assert distance(left[index], expected) <= 1e-10
    assert_same(tuned, plain, output, plain(image))
    assert [gradient.shape for gradient in ours] == [(2, 10, 64)] * (not checkpointing)


@pytest.mark.parametrize("change", [lambda y: 2 * y, lambda y: y.flip(1)])
def test_a_hook_on_a_block_may_change_the_next_experts_input(change: Any) -> None:
    tuned, plain, image = tune(TOKEN)
    before = plain(image)

    def around(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        kept = torch.cat([rows[:, :1], rows[:, 4:]], dim=1)
        changed = change(kept)
        return torch.cat([changed[:, :1], rows[:, 1:4], changed[:, 1:]], dim=1)

    tuned.blocks[1].register_forward_hook(lambda _module, _inputs, rows: change(rows))
    plain.model.blocks[1].register_forward_hook(around)
    assert distance(plain(image), before) > 1e-3
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("variant", BOTH)
def test_modes(variant: str) -> None:
    tuned, _, image = tune(TOKEN, variant)
    for mode in (True, False, True):
        assert tuned.train(mode) is tuned
        assert tuned.training is mode
        for name, module in tuned.named_modules():
            if name == "head" or "prompt" in name:
                assert module.training is mode, f"{name}.training is {module.training}"
            elif name not in ("", "head_drop"):
                assert not module.training, f"{name} is in training mode"
    assert distance(tuned(image), tuned(image)) > 1e-4
    tuned.eval()
    assert torch.equal(tuned(image), tuned(image))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", BOTH)
def test_remove_prompts_restores_everything(family: str, variant: str) -> None:
    base, image = families.build(family), families.images(family)
    base.train()
    base.blocks[1].eval()
    base.blocks[0].mlp.fc1.bias.requires_grad_(False)
    before = snapshot(base)
    tuned = prompt_tune(base, VAPT(3, variant=variant))
    redraw_prompts(tuned)
    output = tuned.train()(image)
    output.square().sum().backward()
    assert remove_prompts(tuned.eval()) is base
    assert_unchanged(base, before)
    assert not any("vpt_fast" in type(m).__module__ for m in base.modules())
    fresh = families.build(family)
    assert torch.equal(base.eval()(image), fresh(image))
    assert distance(output, fresh(image)) > 1e-3
    again, plain = vapt_pair(base, VAPT(2, kernel_size=1, **ACTING))
    compare(again, plain, image)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_copies(duplicate: Any) -> None:
    """A copy computes the same bits, and has a feature projector of its own."""
    tuned, plain, image = tune(TOKEN)
    tuned(image).sum().backward()
    twin = duplicate(tuned)
    assert [type(m) for m in twin.modules()] == [type(m) for m in tuned.modules()]
    assert torch.equal(twin(image), tuned(image))
    compare(twin, plain, image)
    assert not twin.blocks.training
    if duplicate is copy.copy:
        return
    before = tuned.eval()(image)
    with torch.no_grad():
        for parameter in twin.prompt_projector.parameters():
            parameter.mul_(-2)
    assert torch.equal(tuned(image), before)
    other = PlainVAPT(families.build(TOKEN), plain.method, twin.state_dict())
    assert distance(other(image), before) > 1e-3
    compare(twin, other, image)
    assert {type(m) for m in remove_prompts(twin).modules()} == {
        type(m) for m in families.build(TOKEN).modules()
    }


@pytest.mark.parametrize("variant", BOTH)
def test_state_dicts_load(variant: str) -> None:
    """Its own loads strictly; a plain checkpoint loads and leaves the experts alone."""
    tuned, plain, image = tune(TOKEN, variant)
    other = prompt_tune(families.build(TOKEN, seed=3), plain.method).eval()
    other.load_state_dict(tuned.state_dict(), strict=True)
    assert torch.equal(other(image), tuned(image))
    third = prompt_tune(families.build(TOKEN, seed=3), plain.method).eval()
    redraw_prompts(third)
    weights = families.build(TOKEN).state_dict()
    names = list(weights)
    third.load_state_dict(weights, strict=True)
    assert list(weights) == names
    assert torch.equal(third(image), tuned(image))
    with pytest.raises(RuntimeError, match="Missing key.*norm.weight"):
        third.load_state_dict({n: v for n, v in tuned.state_dict().items() if n != "norm.weight"})
    with pytest.raises(RuntimeError, match="mix.weight"):
        wrong = {n: v[..., :1] if "mix" in n else v for n, v in tuned.state_dict().items()}
        third.load_state_dict(wrong)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("variant", BOTH)
def test_adapters(family: str, variant: str, tmp_path: Path) -> None:
    """They hold only what was trained and every field of the method, and give the same bits."""
    method = VAPT(3, 0.2, kernel_size=3, hidden_dim=5, projector_dropout=0.3, variant=variant)
    tuned = prompt_tune(families.build(family, dtype=torch.float32), method)
    redraw_prompts(tuned)
    arguments = families.FAMILIES[family].arguments
    directory = Path(save_adapter(tuned.eval(), tmp_path / "adapter", model_args=arguments))
    stored = load_file(directory / "adapter_model.safetensors")
    assert set(stored) == {name for name, _ in trainable_parameters(tuned)}
    assert set(prompt_names(method, families.depth(family))) < set(stored)
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["method"] == {
        "name": "vapt",
        "num_prompts": 3,
        "dropout": 0.2,
        "kernel_size": 3,
        "hidden_dim": 5,
        "projector_dropout": 0.3,
        "channel_dropout": 0.1,
        "variant": variant,
    }
    loaded = load_adapter(families.build(family, dtype=torch.float32), directory)
    image = families.images(family, dtype=torch.float32)
    assert torch.equal(loaded.eval()(image), tuned(image))
    assert torch.equal(seeded(loaded.train(), image), seeded(tuned.train(), image))
    assert not torch.equal(loaded(image), tuned.eval()(image))
