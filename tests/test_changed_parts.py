"""Parts of blocks that others change after tuning: what is computed is what they now compute.

Adapters of low rank take a Linear's place; hooks change what passes. Both are held against prompts
concatenated into timm's own blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import plain_swin
import pytest
import torch
from families import build, depth, images
from plain import VARIANTS, assert_same, distance, gradients, pair, redraw_prompts
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpt_fast import VAPT, VPTDeep, bake, fold_backbone, prompt_tune, remove_prompts
from vpt_fast.inspection import attention_shares
from vpt_fast.ops.memory_modes import MEMORY_MODES

SWIN = "window4"
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class LowRank(nn.Module):
    """As PEFT's: the Linear is inside, and its weight and bias can be asked for."""

    def __init__(self, base_layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base_layer
        like: Any = {"dtype": base_layer.weight.dtype}
        self.down = nn.Parameter(0.3 * torch.randn(rank, base_layer.in_features, **like))
        self.up = nn.Parameter(0.3 * torch.randn(base_layer.out_features, rank, **like))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def swapped(model: nn.Module, make: Callable[[nn.Linear], nn.Module], names: Any = LINEARS) -> None:
    for block in blocks_of(model):
        for name in names:
            parent = block.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], make(block.get_submodule(name)))


def blocks_of(model: Any) -> list[Any]:
    layers = [model] if hasattr(model, "blocks") else model.layers
    return [block for layer in layers for block in layer.blocks]


def with_low_rank(model: nn.Module) -> None:
    torch.manual_seed(3)
    swapped(model, LowRank)


def merged(model: nn.Module) -> None:
    """The same, in the Linears themselves."""
    torch.manual_seed(3)

    def make(linear: nn.Linear) -> nn.Linear:
        low = LowRank(linear)
        with torch.no_grad():
            linear.weight += low.up @ low.down
        return linear.requires_grad_()

    swapped(model, make)


def methods(count: int) -> dict[str, Any]:
    names = ("linear", "shallow", "deep", "gaps", "last_only", "projected")
    return {**{name: VARIANTS[name](count) for name in names}, "vapt": VAPT(2)}


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("variant", methods(4))
@pytest.mark.parametrize("family", ["vit", "qk_norm", "siglip_average", SWIN])
def test_low_rank_is_the_merged_model(family: str, variant: str, memory: str) -> None:
    """Logits, the prompts' gradients, and those of both factors by the merged weight's."""
    swin = family == SWIN
    if swin and variant in ("gaps", "last_only", "projected", "vapt"):
        pytest.skip("as the others, in windows")
    base = plain_swin.build(family) if swin else build(family)
    count = plain_swin.SWINS[family].depth if swin else depth(family)
    given = plain_swin.images(family) if swin else images(family)
    tuned = prompt_tune(base, methods(count)[variant], memory)
    redraw_prompts(tuned)
    other = copy.deepcopy(tuned)
    with_low_rank(tuned)
    merged(other)
    tuned.eval(), other.eval()
    have, want = tuned(given), other(given)
    assert distance(have, want) <= 1e-10
    ours = gradients(have, {n: p for n, p in tuned.named_parameters() if p.requires_grad})
    theirs = gradients(want, {n: p for n, p in other.named_parameters() if p.requires_grad})
    assert [n for n in ours if n.endswith(".down")]
    for name, found in ours.items():
        place, _, leaf = name.rpartition(".")
        if leaf not in ("down", "up") or not isinstance(tuned.get_submodule(place), LowRank):
            expected = theirs[name]
        else:
            weight = theirs[f"{place}.weight"]
            low = tuned.get_submodule(place)
            expected = low.up.T @ weight if leaf == "down" else weight @ low.down.T
        assert distance(found, expected) <= 1e-9, name


@pytest.mark.parametrize("make", [Scaled, "parametrized", "own forward", "quantised"])
def test_whatever_a_projection_is_it_is_called(make: Any) -> None:
    def change(linear: nn.Linear) -> nn.Module:
        if make == "parametrized":

            class Doubled(nn.Module):
                def forward(self, weight: Tensor) -> Tensor:
                    return 2 * weight

            parametrize.register_parametrization(linear, "weight", Doubled())
        elif make == "own forward":
            forward = linear.forward
            linear.forward = lambda x: forward(x).sin()  # type: ignore[method-assign]
        elif make == "quantised":
            weight = (4 * linear.weight.detach()).round() / 4

            class Rounded(nn.Module):  # with nothing that could be read
                def forward(self, x: Tensor) -> Tensor:
                    return x @ weight.T + linear.bias.detach()

            return Rounded()
        else:
            linear.__class__ = Scaled
        return linear

    tuned, plain = pair(build("vit"), VPTDeep(3))
    swapped(tuned, change, ["attn.qkv"])
    swapped(plain.model, change, ["attn.qkv"])
    assert_same(tuned, plain, tuned(images("vit")), plain(images("vit")))
    if make == "own forward":
        with pytest.raises(ValueError, match="qkv has a forward of its own"):
            bake(tuned)
        return
    assert distance(bake(copy.deepcopy(tuned.eval()))(images("vit")), plain(images("vit"))) <= 1e-10


def changed(x: Tensor) -> Tensor:
    """No norm undoes it."""
    return 1.25 * x + 0.5 * x.sin()


def changing(kind: str) -> Callable[[nn.Module], Any]:
    """Registers a hook that changes what it sees, row by row."""

    def register(module: nn.Module) -> Any:
        if kind == "before":
            return module.register_forward_pre_hook(lambda m, args: (changed(args[0]),))
        return module.register_forward_hook(lambda m, args, out: changed(out))

    return register


HOOKED = (
    "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.attn_drop",
    "attn.proj", "attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act",
    "mlp.fc2", "ls2", "drop_path2",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("variant", ["shallow", "deep", "gaps", "last_only"])
def test_hooks_that_change_what_passes(variant: str, name: str, kind: str) -> None:
    """In every block, in every memory mode, as in the plain formulation; and once they are gone."""
    if name == "attn.attn_drop":
        pytest.skip("timm's fused attention does not call it either")
    tuned, plain = pair(build("vit"), VARIANTS[variant](4))
    given = images("vit")
    before = plain(given)
    for memory in MEMORY_MODES:
        tuned.tune_record.memory = memory
        for block in tuned.blocks:
            block.memory = memory
        handles = [
            changing(kind)(block.get_submodule(name))
            for model in (tuned, plain.model) for block in model.blocks
        ]  # fmt: skip
        expected = plain(given)
        assert distance(expected, before) > 1e-3
        assert_same(tuned, plain, tuned(given), expected)
        for handle in handles:
            handle.remove()
    assert_same(tuned, plain, tuned(given), before)


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.k_norm", "attn", "attn.norm", "mlp"])
def test_a_hook_fires_once(name: str) -> None:
    tuned, _ = pair(build("vit"), VPTDeep(3))
    seen: list[int] = []
    tuned.blocks[1].get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    tuned(images("vit"))
    assert seen == [1]


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.softmax"])
def test_windows_refuse_hooks_that_would_miss_prompts(name: str, kind: str) -> None:
    tuned, plain = plain_swin.pair(plain_swin.build(SWIN), VPTDeep(3))
    given = plain_swin.images(SWIN)
    before = tuned(given)
    handle = changing(kind)(blocks_of(tuned)[1].get_submodule(name))
    with pytest.raises(ValueError, match=f"{name} of this block is hooked"):
        tuned(given)
    handle.remove()
    handle = changing("before")(blocks_of(tuned)[1].attn)
    with pytest.raises(ValueError, match="attn of this block has a hook before"):
        tuned(given)
    handle.remove()
    assert torch.equal(tuned(given), before)


def pooled_row(model: Any) -> Any:
    return lambda x, *args, **more: x[:, 1:].sin().mean(1)


def head_of_all(model: Any) -> Any:
    return lambda x, pre_logits=False: model.head(x.sin().mean(1))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "make"), [("pool", pooled_row), ("forward_head", head_of_all)])
def test_a_head_of_the_instances_own_reads_all_rows(name: str, make: Any, when: str) -> None:
    base = build("vit")
    if when == "before":
        setattr(base, name, make(base))
    tuned = prompt_tune(base, VPTDeep(3))
    redraw_prompts(tuned)
    given = images("vit")
    if when == "after":
        tuned(given)
        setattr(tuned, name, make(tuned))
    rows = tuned.forward_features(given)
    assert rows.shape[1] == 10
    want = tuned.head(make(tuned)(rows)) if name == "pool" else make(tuned)(rows)
    assert distance(tuned(given), want) <= 1e-12


@pytest.mark.parametrize("family", ["vit", "mae", "siglip_map"])
@pytest.mark.parametrize("variant", ["shallow", "deep"])
def test_blocks_that_are_taken_away(variant: str, family: str) -> None:
    tuned, plain = pair(build(family), VARIANTS[variant](depth(family)))
    tuned.blocks, plain.model.blocks = tuned.blocks[:2], plain.model.blocks[:2]
    plain.blocks = [index for index in plain.blocks if index < 2]
    given = images(family)
    expected = plain(given)
    assert distance(tuned(given), expected) <= 1e-10
    tuned.blocks.register_forward_hook(lambda *_: None)
    assert distance(tuned(given), expected) <= 1e-10


def test_a_block_in_two_places_is_refused() -> None:
    model = build("vit")
    first, second = model.blocks[0], model.blocks[1]
    model.blocks = nn.Sequential(first, second, first)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"blocks\.2 is blocks\.0 again; give each place a copy"):
        prompt_tune(model, VPTDeep(3))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("value", ["no", "yes", 1, None])
def test_whether_graphs_are_wanted_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="cuda_graphs is .*; use True or False"):
        prompt_tune(build("vit"), VPTDeep(3), cuda_graphs=value)


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("change", ["edited", "replaced"])
@pytest.mark.parametrize("family", ["qk_norm", "dinov2_swiglu", SWIN])
def test_weights_that_are_computed_with_again_are_the_same(
    family: str, change: str, memory: str
) -> None:
    """Module by module; in "speed" autograd itself refuses, or holds what was replaced."""
    swin = family == SWIN
    base = plain_swin.build(family) if swin else build(family)
    tuned = prompt_tune(base, VPTDeep(3), memory)
    redraw_prompts(tuned)
    given = plain_swin.images(family) if swin else images(family)
    block = blocks_of(tuned)[1]
    if swin:
        block.mlp.register_forward_hook(lambda *_: None)  # so that it is not fused
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    expected = gradients(tuned(given), trained)
    output = tuned(given)
    with torch.no_grad():
        weight = block.mlp.fc2.weight
        if change == "edited":
            weight.mul_(1.5)
        else:
            block.mlp.fc2.weight = nn.Parameter(1.5 * weight, requires_grad=False)
    if change == "replaced" and memory == "speed":
        found = gradients(output, trained)
        assert all(distance(found[name], expected[name]) <= 1e-12 for name in expected)
        return
    wanted = "replaced between" if change == "replaced" else "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=wanted):
        output.sum().backward()
    assert distance(tuned(given), output) > 1e-6
    tuned(given).sum().backward()


def test_what_takes_a_linears_place_before_tuning_is_named() -> None:
    model = build("vit")
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv is \S*LowRank; .* tune first"):
        prompt_tune(model, VPTDeep(3))
    tuned = plain_swin.build(SWIN)
    tuned.layers[0].blocks = nn.Sequential(tuned.layers[0].blocks[0], tuned.layers[0].blocks[0])
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1 is layers\.0\.blocks\.0 again"):
        prompt_tune(tuned, VPTDeep(3))


@pytest.mark.parametrize("family", ["vit", "qk_norm", SWIN])
def test_what_is_inspected_is_what_is_computed(family: str) -> None:
    base = plain_swin.build(family) if family == SWIN else build(family)
    given = plain_swin.images(family) if family == SWIN else images(family)
    tuned = prompt_tune(base, VPTDeep(3))
    redraw_prompts(tuned)
    other = copy.deepcopy(tuned)
    with_low_rank(tuned)
    merged(other)
    for found, expected in zip(
        attention_shares(tuned, given), attention_shares(other, given), strict=True
    ):
        assert distance(found.prompts, expected.prompts) <= 1e-10


def test_folding_takes_plain_linears_only() -> None:
    tuned = prompt_tune(build("vit"), VPTDeep(3))
    with_low_rank(tuned)
    before = copy.deepcopy(tuned.state_dict())
    with pytest.raises(ValueError, match=r"cannot fold blocks\.0\.attn\.qkv: .* a LowRank; merge"):
        fold_backbone(tuned)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_folding_leaves_another_model_of_the_same_weights_alone() -> None:
    one, other = build("deit3"), build("deit3")
    for block, same in zip(one.blocks, other.blocks, strict=True):
        for name, parameter in block.named_parameters():
            place, _, leaf = name.rpartition(".")
            setattr(same.get_submodule(place), leaf, parameter)
    given = images("deit3")
    prompt_tune(one, VPTDeep(3)), prompt_tune(other, VPTDeep(3))
    before, theirs = one(given), other(given)
    fold_backbone(one)
    assert torch.equal(other(given), theirs) and distance(one(given), before) <= 1e-10
    remove_prompts(one)
    assert torch.equal(other(given), theirs)


def lend_weights(model: nn.Module, kept: str = "-") -> None:
    """As accelerate's cpu_offload: a module has tensors of its own only while it is called."""
    for name, module in model.named_modules():
        own = {leaf: value for leaf, value in module._parameters.items() if value is not None}
        if not own or kept in name:
            continue
        forward = module.forward

        def take(module: Any = module, own: Any = own) -> None:
            for leaf, value in own.items():
                away = torch.empty_like(value, device="meta")
                module._parameters[leaf] = nn.Parameter(away, value.requires_grad)

        def lent(
            *args: Any, module: Any = module, own: Any = own, call: Any = forward,
            end: Any = take, **more: Any,
        ) -> Any:  # fmt: skip
            module._parameters.update(own)
            try:
                return call(*args, **more)
            finally:
                end()

        module.forward = lent  # type: ignore[method-assign]
        take()


@pytest.mark.parametrize("family", ["vit", "siglip_average", "qk_norm", "deit_distilled", SWIN])
@pytest.mark.parametrize("variant", ["linear", "shallow", "deep", "projected", "shared", "vapt"])
def test_weights_that_are_there_only_while_a_module_is_called(variant: str, family: str) -> None:
    swin = family == SWIN
    if swin and variant in ("projected", "shared"):
        pytest.skip("stages have their own widths")
    method = VAPT(2) if variant == "vapt" else VARIANTS[variant](3)
    given = plain_swin.images(family) if swin else images(family)
    tuned = prompt_tune(plain_swin.build(family) if swin else build(family), method).eval()
    redraw_prompts(tuned)
    with torch.no_grad():
        expected = tuned(given)
        if variant == "vapt":
            refused = copy.deepcopy(tuned)
            lend_weights(refused)
            with pytest.raises(ValueError, match="prompt experts' weights are on the meta device"):
                refused(given)
        lend_weights(tuned, kept="prompt" if variant == "vapt" else "-")
        assert distance(tuned(given), expected) <= 1e-12


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_prompts_train_where_weights_are_lent(memory: str) -> None:
    tuned = prompt_tune(build("vit"), VPTDeep(3), memory)
    redraw_prompts(tuned)
    given = images("vit")
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    expected = gradients(tuned(given), trained)
    lend_weights(tuned)
    found = gradients(tuned(given), trained)
    assert all(distance(found[name], expected[name]) <= 1e-10 for name in expected)
