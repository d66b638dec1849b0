"""Features, intermediates and hooks of a tuned model are timm's, without prompt rows.

Expected results come from timm's own methods, run on the plain formulation's block outputs
(`Plain.playback`), so every argument has timm's meaning.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import VARIANTS, Plain, assert_same, distance, pair, redraw_prompts
from support.unchanged import assert_alike
from torch import Tensor, nn

from vpt_fast import VPTDeep, VPTShallow, prompt_tune

SOME = ("linear", "shallow", "deep", "first", "gaps", "middle_only", "last_only")
PREFIXES = (TOKEN, "dinov2_registers", "siglip_map", "deit_distilled", "dynamic")


def tune(family: str, variant: str) -> tuple[nn.Module, Any, Tensor]:
    tuned, plain = pair(families.build(family), VARIANTS[variant](families.depth(family)))
    return tuned, plain, families.images(family)


@pytest.mark.parametrize("family", [*PREFIXES, AVERAGE, "all_tokens", "prr_pool", "one_patch"])
@pytest.mark.parametrize("variant", SOME)
def test_features_and_head(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    expected = plain.features(image)
    found = tuned.forward_features(image)
    assert distance(found, expected) <= 1e-10
    for pre_logits in (False, True):
        head = tuned.forward_head(found, pre_logits=pre_logits)
        assert distance(head, plain.model.forward_head(expected, pre_logits=pre_logits)) <= 1e-10


@pytest.mark.parametrize("variant", ["shallow", "deep", "first"])
def test_gradients_through_features(variant: str) -> None:
    tuned, plain, image = tune(TOKEN, variant)
    tuned.train()
    output = tuned.forward_head(tuned.forward_features(image))
    assert_same(tuned, plain, output, plain(image))


OPTIONS = [
    dict(zip(("return_prefix_tokens", "norm", "stop_early", "output_fmt"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (False, True), ("NCHW", "NLC"))
]


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("variant", SOME)
def test_forward_intermediates(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    depth = families.depth(family)
    with torch.no_grad():
        timms = plain.playback(image)
        for number, options in enumerate(OPTIONS):
            # Each option meets each kind of index; the early ends leave live rows at the end.
            for indices in ([0], [-2], [None, 2, [0, depth - 1], [1]][number % 4]):
                expected = timms.forward_intermediates(image, indices, **options)
                assert_alike(tuned.forward_intermediates(image, indices, **options), expected)
            only = tuned.forward_intermediates(image, [1], intermediates_only=True, **options)
            assert_alike(only, timms.forward_intermediates(image, [1], **options)[1])


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("variant", SOME)
def test_forward_intermediates_as_dictionary(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    with torch.no_grad():
        timms = plain.playback(image)
        for prefix, only, early in itertools.product((False, True), repeat=3):
            options = {
                "return_prefix_tokens": prefix,
                "intermediates_only": only,
                "stop_early": early,
                "output_dict": True,
            }
            expected = timms.forward_intermediates(image, [0, 1], **options)
            assert_alike(tuned.forward_intermediates(image, [0, 1], **options), expected)


@pytest.mark.parametrize("variant", ["shallow", "deep", "gaps"])
def test_intermediates_under_a_mask(variant: str) -> None:
    tuned, plain, image = tune(TOKEN, variant)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    timms = plain.playback(image, mask)
    expected = timms.forward_intermediates(image, return_prefix_tokens=True, norm=True)
    found = tuned.forward_intermediates(image, return_prefix_tokens=True, norm=True, attn_mask=mask)
    assert_alike(found, expected)


@pytest.mark.parametrize("variant", ["shallow", "deep", "first", "middle_only"])
def test_gradients_through_intermediates(variant: str) -> None:
    """A loss on the intermediates trains the prompts as in the plain formulation."""
    tuned, plain, image = tune(TOKEN, variant)
    tuned.train()
    names = [n for n, p in tuned.named_parameters() if p.requires_grad and "prompt" in n]
    parameters = dict(tuned.named_parameters())
    last = tuned.forward_intermediates(image, intermediates_only=True)
    ours = torch.autograd.grad(sum(y.sin().sum() for y in last), [parameters[n] for n in names])
    last = plain.playback(image).forward_intermediates(image, intermediates_only=True)
    theirs = torch.autograd.grad(
        sum(y.sin().sum() for y in last), [plain.trained[n] for n in names]
    )
    for one, other in zip(ours, theirs, strict=True):
        assert distance(one, other) <= 1e-10


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("variant", SOME)
def test_get_intermediate_layers(family: str, variant: str) -> None:
    tuned, plain, image = tune(family, variant)
    with torch.no_grad():
        timms = plain.playback(image)
        for n, reshape, prefix, norm in itertools.product((1, 2, [0, 1]), *[(False, True)] * 3):
            options = {"n": n, "reshape": reshape, "return_prefix_tokens": prefix, "norm": norm}
            assert_alike(
                tuned.get_intermediate_layers(image, **options),
                timms.get_intermediate_layers(image, **options),
            )


@pytest.mark.parametrize("family", [TOKEN, "siglip_average"])
@pytest.mark.parametrize("variant", SOME)
@pytest.mark.parametrize("prune_norm", [False, True])
def test_prune_intermediate_layers(family: str, variant: str, prune_norm: bool) -> None:
    """The model ends earlier: its new last block strips its live rows."""
    tuned, plain, image = tune(family, variant)
    last = families.depth(family) - 2
    with torch.no_grad():
        timms = plain.playback(image)
        expected_kept = timms.prune_intermediate_layers([last], prune_norm=prune_norm)
        assert tuned.prune_intermediate_layers([last], prune_norm=prune_norm) == expected_kept
        assert len(tuned.blocks) == last + 1
        assert_alike(
            tuned.forward_intermediates(image, [last]), timms.forward_intermediates(image, [last])
        )
        assert distance(tuned.forward_features(image), timms.forward_features(image)) <= 1e-10
        assert distance(tuned(image), timms(image)) <= 1e-10


@pytest.mark.parametrize("method", [VPTShallow(3), VPTDeep(3)])
def test_features_only_is_unwrapped_or_refused(method: Any) -> None:
    wrapped = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=[0, 1],
        **{k: v for k, v in families.FAMILIES[TOKEN].arguments.items() if k != "num_classes"},
    ).double()
    families.randomise(wrapped)
    wrapped.eval()
    inner, image, untouched = wrapped.model, families.images(TOKEN), copy.deepcopy(wrapped.model)
    before = {name: type(module) for name, module in wrapped.named_modules()}
    try:
        returned = prompt_tune(wrapped, method)
    except (TypeError, ValueError) as error:
        assert type(wrapped).__name__ in str(error)
        assert {name: type(module) for name, module in wrapped.named_modules()} == before
        prompt_tune(inner, method)
    else:
        assert returned is wrapped
    redraw_prompts(inner)
    plain = Plain(untouched, method, inner.state_dict())
    for found, expected in zip(
        wrapped(image), plain.playback(image).forward_intermediates(image, [0, 1])[1], strict=True
    ):
        assert distance(found, expected) <= 1e-10


def _watch(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled", AVERAGE, "token_fc_norm"])
@pytest.mark.parametrize("variant", SOME)
def test_hooks_see_all_rows(family: str, variant: str) -> None:
    """A hook on the last block, the final norm or their parts sees every token, no prompt."""
    for module in ("blocks.{last}", "norm", "blocks.{last}.mlp", "blocks.{last}.attn"):
        tuned, plain, image = tune(family, variant)
        last = len(tuned.blocks) - 1
        seen = _watch(tuned.get_submodule(module.format(last=last)))
        with torch.no_grad():
            output = tuned(image)
        expected = plain.block_outputs(image)[-1]
        assert len(seen) == 1, f"the hook on {module} ran {len(seen)} times"
        if variant in ("deep", "last_only", "linear") or "." not in module:
            assert seen[0].shape == expected.shape
        if module == "blocks.{last}":
            assert distance(seen[0], expected) <= 1e-10
        if module == "norm":
            assert distance(seen[0], plain.features(image)) <= 1e-10
        assert distance(output, plain(image)) <= 1e-10


@pytest.mark.parametrize(
    "inner", ["norm1", "attn", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp", "mlp.fc1", "ls2"]
)
@pytest.mark.parametrize("where", [0, 2])
def test_hooks_inside_blocks_run(inner: str, where: int) -> None:
    """They run once: with prompts among the tokens up to prompt_kv, and without them afterwards."""
    tuned, plain, image = tune("deit3", "deep")
    seen = _watch(tuned.get_submodule(f"blocks.{where}.{inner}"))
    with torch.no_grad():
        output = tuned(image)
    assert distance(output, plain(image)) <= 1e-10
    rows = 10 + (3 if inner in ("norm1", "attn.qkv") else 0)
    assert [tuple(found.shape[:2]) for found in seen] == [(2, rows)]


@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_hooks_may_change_inputs_and_outputs(variant: str) -> None:
    tuned, plain, image = tune(TOKEN, variant)
    for model in (tuned, plain.model):
        model.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0].flip(1),))
        model.patch_embed.register_forward_hook(lambda _module, _inputs, output: output * 2)
    assert distance(tuned(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [TOKEN, "siglip_average"])
@pytest.mark.parametrize("variant", SOME)
def test_hooks_on_blocks(family: str, variant: str, checkpointing: bool) -> None:
    """Hooks see the inputs and outputs of timm's blocks, without the live prompt rows."""
    tuned, plain, image = tune(family, variant)
    tuned.set_grad_checkpointing(checkpointing)
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    for index, block in enumerate(tuned.blocks):
        block.register_forward_pre_hook(
            lambda _module, inputs, index=index: entered.update({index: inputs[0].detach()})
        )
        block.register_forward_hook(
            lambda _module, _inputs, output, index=index: left.update({index: output.detach()})
        )
    output = tuned.train()(image)
    for index, expected in enumerate(plain.block_outputs(image)):
        assert distance(left[index], expected) <= 1e-10
        if index:
            assert torch.equal(entered[index], left[index - 1])
    assert_same(tuned, plain, output, plain(image))


@pytest.mark.parametrize("variant", ["shallow", "deep", "gaps"])
def test_hooks_on_gradients(variant: str) -> None:
    """A backward hook on a block sees the gradient of its tokens."""
    tuned, plain, image = tune(TOKEN, variant)
    ours: list[Tensor] = []
    tuned.blocks[1].register_full_backward_hook(lambda _m, _i, output: ours.append(output[0]))
    tuned.train()(image).tanh().sum().backward()
    assert len(ours) == 1
    assert ours[0].shape == (2, 10, 64)
    outputs = [*plain.sequence(image)]
    gradient = torch.autograd.grad(
        plain.model.forward_head(plain.model.norm(strip(outputs[-1], plain.live))).tanh().sum(),
        outputs[1],
    )[0]
    assert distance(ours[0], strip(gradient, gradient.shape[1] - 10)) <= 1e-10


def strip(rows: Tensor, live: int) -> Tensor:
    """Remove the `live` rows after the class token."""
    return torch.cat([rows[:, :1], rows[:, 1 + live :]], dim=1)


@pytest.mark.parametrize("family", [TOKEN, AVERAGE, "siglip_average"])
@pytest.mark.parametrize("variant", ["shallow", "deep", "middle_only"])
def test_another_input_size(family: str, variant: str) -> None:
    tuned, plain, _ = tune(family, variant)
    for model in (tuned, plain.model):
        model.set_input_size((32, 40))
    assert not tuned.pos_embed.requires_grad
    image = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    assert_same(tuned.train(), plain, tuned(image), plain(image))


@pytest.mark.parametrize("variant", ["shallow", "deep", "last_only"])
@pytest.mark.parametrize(("classes", "pool"), [(7, None), (7, "avg"), (4, ""), (0, None)])
def test_another_classifier(variant: str, classes: int, pool: str | None) -> None:
    """The head is checked in every call: no row that a new pooling reads is skipped."""
    tuned, plain, image = tune(TOKEN, variant)
    tuned(image)
    for model in (tuned, plain.model):
        model.reset_classifier(classes, pool)
    plain.model.head.load_state_dict(tuned.head.state_dict())
    for name in [name for name in plain.trained if name.startswith("head.")]:
        del plain.trained[name]
    plain.trained |= {f"head.{name}": p for name, p in plain.model.head.named_parameters()}
    output = tuned.train()(image)
    assert output.shape[-1] == (classes or 64)
    assert_same(tuned, plain, output, plain(image))
