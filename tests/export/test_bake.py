"""`bake`: a plain module with the tuned model's logits."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import VARIANTS, distance, pair, redraw_prompts
from support.formulations.plain_baselines import BASELINES, baseline_pair
from support.formulations.plain_vapt import vapt_pair
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, bake, fold_backbone, prompt_tune

EXACT = 1e-12
EXPERTS = {
    "code": VAPT(3, dropout=0.2),
    "paper": VAPT(2, variant="paper"),
    "one": VAPT(1, kernel_size=1, hidden_dim=3),
}
# A grid smaller than the kernel, and images of another size than the model's.
NO_EXPERTS = {"one_patch", "dynamic", "dynamic_padded"}


def tuned_pair(family: str, method: Any, seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """Return a tuned model with prompts of order one, in float64, and its plain formulation."""
    pairs = vapt_pair if isinstance(method, VAPT) else pair
    return pairs(families.build(family, seed, **overrides), method)


def tune(family: str, method: Any, **overrides: Any) -> Any:
    tuned = prompt_tune(families.build(family, **overrides), method)
    redraw_prompts(tuned)
    return tuned.eval()


def deep(family: str = TOKEN) -> Any:
    return tune(family, VPTDeep(3))


def assert_equal(baked: nn.Module, tuned: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        for batch in (1, 3):
            assert distance(baked(image[:batch]), tuned(image[:batch])) <= EXACT


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str) -> None:
    image = families.images(family, batch=3)
    for method in (VPTDeep(3), VPTShallow(2), EXPERTS["code"]):
        if isinstance(method, VAPT) and family in NO_EXPERTS:
            continue
        tuned = tune(family, method)
        assert_equal(bake(tuned), tuned, image)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((TOKEN, variant) for variant in (*VARIANTS, *EXPERTS)),
        *itertools.product((AVERAGE, "deit_distilled", "qk_norm"), ("gaps", "first", "paper")),
    ],
)
def test_every_method(family: str, variant: str) -> None:
    method = EXPERTS.get(variant) or VARIANTS[variant](families.depth(family))
    tuned = tune(family, method)
    baked, image = bake(tuned), families.images(family, batch=3)
    assert_equal(baked, tuned, image)
    with torch.no_grad():
        found, expected = baked.forward_features(image), tuned.forward_features(image)
    assert distance(found, expected) <= EXACT
    names = {name for name, _ in baked.named_parameters()}
    plain = {name for name, _ in families.build(family).named_parameters()}
    assert names == plain


@pytest.mark.parametrize(
    "method",
    [VPTShallow(3, pool_prompts=True), VPTDeep(3, pool_prompts=True), VPTDeep(2, blocks=[2])],
    ids=["shallow", "deep", "last"],
)
@pytest.mark.parametrize("family", [AVERAGE, "siglip_map", "max_pool"])
def test_prompts_that_are_pooled(family: str, method: Any) -> None:
    tuned = tune(family, method, depth=3)
    assert_equal(bake(tuned), tuned, families.images(family, batch=3))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product((TOKEN, "siglip_map"), BASELINES),
        ("deit_distilled", "linear"),
        *itertools.product(("dinov2", "deit_distilled"), ("adapter", "bias")),
    ],
)
def test_baselines(family: str, name: str) -> None:
    tuned = baseline_pair(families.build(family), BASELINES[name])[0].eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    baked = bake(tuned)
    assert_equal(baked, tuned, families.images(family, batch=3))
    if name == "adapter":
        return
    plain = VisionTransformerDistilled if family == "deit_distilled" else VisionTransformer
    assert type(baked) is plain
    assert {type(block) for block in baked.blocks} == {Block}
    assert {type(block.attn) for block in baked.blocks} == {Attention}
    if not name.startswith("mlp"):
        families.build(family).load_state_dict(baked.state_dict(), strict=True)


def test_no_prompts_is_timms_class() -> None:
    for method in (VPTDeep(0), VPTShallow(0), VAPT(0)):
        tuned = prompt_tune(families.build(TOKEN), method)
        baked = bake(tuned)
        assert type(baked) is VisionTransformer
        assert_equal(baked, tuned.eval(), families.images(TOKEN, batch=3))


def test_a_head_that_is_off_and_one_that_is_replaced() -> None:
    tuned = baseline_pair(families.build(TOKEN), BASELINES["mlp-wide"])[0].eval()
    tuned.reset_classifier(0)
    assert_equal(bake(tuned), tuned, families.images(TOKEN, batch=3))
    tuned = deep()
    tuned.reset_classifier(7)
    baked = bake(tuned)
    assert_equal(baked, tuned, families.images(TOKEN, batch=3))
    baked.reset_classifier(2, "avg")
    assert baked(families.images(TOKEN, batch=3)).shape == (3, 2)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "method",
    [VPTDeep(3, dropout=0.3, shared=True, project_dim=5), VPTShallow(3), EXPERTS["code"]],
    ids=["deep", "shallow", "vapt"],
)
def test_the_tuned_model_does_not_change(method: Any, folded: bool) -> None:
    tuned = tune("dinov2", method)
    if folded:
        fold_backbone(tuned)
    tuned.set_grad_checkpointing(True)
    tuned.train()
    before = {name: tensor.clone() for name, tensor in _tensors(tuned).items()}
    flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
    modes = {name: (type(m), m.training) for name, m in tuned.named_modules()}
    fold = copy.deepcopy(tuned.tune_record.fold)
    baked: Any = bake(tuned)
    after = _tensors(tuned)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert flags == {name: p.requires_grad for name, p in tuned.named_parameters()}
    assert modes == {name: (type(m), m.training) for name, m in tuned.named_modules()}
    assert tuned.grad_checkpointing and not baked.grad_checkpointing
    if fold is not None:
        assert tuned.tune_record.fold.scales == fold.scales
        assert tuned.tune_record.fold.originals.keys() == fold.originals.keys()
    addresses = {t.untyped_storage().data_ptr() for t in after.values()}
    assert not addresses & {t.untyped_storage().data_ptr() for t in _tensors(baked).values()}
    assert not any(p.requires_grad for p in baked.parameters())
    assert not any(module.training for module in baked.modules())
    assert not any("prompt" in name for name, _ in baked.named_parameters())
    for name in ("tune_record", "prompt_tokens", "prompt_projection", "prompt_projector"):
        assert not hasattr(baked, name)


def test_a_folded_model_is_baked_unfolded() -> None:
    for method in (VPTDeep(3), VPTDeep(2, blocks=[0]), EXPERTS["code"]):
        tuned = tune("dinov2", method)
        plain = bake(tuned).state_dict()
        baked = bake(fold_backbone(tuned))
        assert_equal(baked, tuned, families.images("dinov2", batch=3))
        state = baked.state_dict()
        assert state.keys() == plain.keys()
        assert all(state[name].equal(plain[name]) for name in plain)
        baked.load_state_dict(plain, strict=True)
        assert all(baked.state_dict()[name].equal(plain[name]) for name in plain)


def test_baked_kv_are_those_of_the_prompts() -> None:
    tuned = deep("qk_norm")
    baked: Any = bake(tuned)
    for plain, block in zip(tuned.blocks, baked.blocks, strict=True):
        rows = plain.attn.qkv(plain.norm1(plain.prompt.tokens))
        _, k, v = rows.unflatten(1, (3, plain.attn.num_heads, -1)).permute(1, 2, 0, 3)
        assert distance(block.attn.prompt_keys, plain.attn.k_norm(k)) <= EXACT
        assert distance(block.attn.prompt_values, v) <= EXACT


@pytest.mark.parametrize(
    ("family", "name"), [(TOKEN, "deep"), ("qk_norm", "gaps"), (TOKEN, "code")]
)
def test_low_precision(family: str, name: str) -> None:
    """No further from float64 than the plain formulation in the same precision, plus a fifth.

    Baked before the cast, after it, and under autocast; in the mean over eight models.
    """
    method = EXPERTS.get(name) or VARIANTS[name](2)
    errors = {
        dtype: torch.zeros(4, dtype=torch.float64) for dtype in (torch.float32, torch.bfloat16)
    }
    for seed in range(8):
        tuned, truth = tuned_pair(family, method, seed, depth=2)
        image = families.images(family, batch=4, seed=seed + 50)
        with torch.no_grad():
            expected, baked = truth(image), bake(tuned)
            for dtype, total in errors.items():
                small = image.to(dtype)
                found = [truth.narrowed(dtype)(small), copy.deepcopy(baked).to(dtype)(small)]
                found.append(bake(copy.deepcopy(tuned).to(dtype))(small))
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    found.append(copy.deepcopy(baked).float()(image.float()))
                assert {logits.dtype for logits in found} == {dtype}
                off = [(logits.double() - expected).norm() / expected.norm() for logits in found]
                total += torch.stack(off)
    for total in errors.values():
        assert (total[1:] <= 1.2 * total[0]).all(), errors


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (TOKEN, VPTDeep(3)),
        ("deit_distilled", VPTDeep(3, blocks=[0])),
        (AVERAGE, VPTShallow(3)),
        (TOKEN, EXPERTS["code"]),
        (TOKEN, BASELINES["adapter"]),
    ],
    ids=["deep", "gap", "shallow", "vapt", "adapter"],
)
def test_copies_pickles_and_state_dicts(family: str, method: Any) -> None:
    pairs = baseline_pair if method is BASELINES["adapter"] else tuned_pair
    base = families.build(family) if method is BASELINES["adapter"] else family
    baked: Any = bake(pairs(base, method)[0])
    image = families.images(family, batch=3)
    expected = baked(image)
    for twin in (copy.deepcopy(baked), pickle.loads(pickle.dumps(baked))):
        assert type(twin) is type(baked) and not twin.training
        assert twin(image).equal(expected)
    other: Any = bake(prompt_tune(families.build(family, seed=5), method))
    assert not other(image).equal(expected)
    other.load_state_dict(baked.state_dict(), strict=True)
    assert other(image).equal(expected)
    with torch.inference_mode():
        assert baked(image).equal(expected)
        assert bake(prompt_tune(families.build(family), LinearProbe())).cls_token.is_leaf
    single = baked.to(torch.float32)
    assert {t.dtype for t in _tensors(single).values()} == {torch.float32}
    assert distance(single(image.float()), expected) <= 1e-4


def test_baked_in_inference_mode() -> None:
    tuned = deep()
    with torch.inference_mode():
        baked = bake(tuned)
    assert not any(tensor.is_inference() for tensor in _tensors(baked).values())


@pytest.mark.parametrize("method", [VPTDeep(3), EXPERTS["code"]], ids=["deep", "vapt"])
def test_intermediates_and_feature_hooks_are_timms(method: Any) -> None:
    tuned = tune(TOKEN, method)
    baked: Any = bake(tuned)
    image, rows = families.images(TOKEN), []
    with torch.no_grad():
        ours, theirs = baked.forward_intermediates(image), tuned.forward_intermediates(image)
        expected = tuned.get_intermediate_layers(image, [1], norm=True)[0]
    assert all(distance(a, b) <= EXACT for a, b in zip(ours[1], theirs[1], strict=True))
    handle = baked.blocks[-1].mlp.register_forward_hook(lambda *a: rows.append(a[2].shape[1]))
    watched = baked(image)
    handle.remove()
    assert rows == [10]
    assert distance(baked(image), watched) <= EXACT
    baked.prune_intermediate_layers([1])
    assert distance(baked(image)[:, 1:], expected) <= EXACT


def last_mlp_rows(baked: Any, image: Tensor) -> int:
    """Count the rows of the last MLP; a hook on the module would make it compute all rows."""
    rows: dict[nn.Module, int] = {}
    plain = nn.Linear.forward

    def spy(self: nn.Linear, x: Tensor) -> Tensor:
        rows[self] = x.shape[1]
        return plain(self, x)

    with mock.patch.object(nn.Linear, "forward", spy):
        baked(image)
    return rows[baked.blocks[-1].mlp.fc1]


@pytest.mark.parametrize(("family", "count"), [(TOKEN, 1), ("deit_distilled", 2), (AVERAGE, 10)])
def test_the_last_block_computes_what_the_head_reads(family: str, count: int) -> None:
    for method in (VPTDeep(3), VPTShallow(3), EXPERTS["code"]):
        baked = bake(tune(family, method))
        assert last_mlp_rows(baked, families.images(family)) == count
