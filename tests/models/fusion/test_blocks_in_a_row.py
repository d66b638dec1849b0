"""Blocks that run as one function equal blocks one by one, and are freed one by one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import distance, redraw_prompts, tuned_gradients
from test_first_rows import BATCH, HEADS, KINDS, ROWS, WIDTH, rand, sources, weights
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks
from vpt_fast.ops.block.parts import BlockConfig
from vpt_fast.ops.block.sites import REFERENCE_SITES
from vpt_fast.ops.memory_modes import MEMORY_MODES

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "late": VPTDeep(3, blocks=[1, 2]),
    "dropout": VPTDeep(3, dropout=0.4),
    "vapt": VAPT(3),
}

ORDERS = {
    "none_keys_experts": ("none", "keys", "experts"),
    "experts_none_dropped": ("experts", "none", "dropped"),
    "paper_folded_static": ("paper", "folded", "static"),
}


def run(steps: Sequence[BlockSteps], x: Tensor, branch: Any, given: Any, apart: bool) -> Any:
    if not apart:
        return run_blocks(steps, x, branch, given)
    for each, own in zip(steps, given, strict=True):
        x, branch = run_blocks([each], x, branch, [own])
    return x, branch


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_those_of_blocks_one_by_one(
    order: str, memory: str, has_branch: bool
) -> None:
    """Whatever needs one: all, the input, one block's prompts; the last computes two rows."""
    kinds = ORDERS[order]
    assert set(kinds) <= set(KINDS)
    found = [sources(kind) for kind in kinds]
    steps = [
        BlockSteps(
            BlockConfig(HEADS, 0.6, 0.1, 0.2, "gelu", memory, source, None, 2 if last else None),
            weights() if i or has_branch else weights()._replace(branch_scale=None),
            torch.float64,
            REFERENCE_SITES,
        )
        for i, (source, _) in enumerate(found)
        for last in [i == len(found) - 1]
    ]
    x, branch = rand(BATCH, ROWS, WIDTH, seed=21), rand(BATCH, ROWS, WIDTH, seed=22)
    inputs = [x, *([branch] if has_branch else [])]
    trained = [[t for t in tensors if t is not None and t.is_floating_point()]
               for _, tensors in found]  # fmt: skip
    for needed in ([inputs, *trained], [inputs], *([own] for own in trained if own)):
        leaves = [t for group in needed for t in group]
        for tensor in leaves:
            tensor.requires_grad_()
        results = []
        for apart in (False, True):
            given = [tensors for _, tensors in found]
            outputs = run(steps, x, branch if has_branch else None, given, apart)
            loss = sum((o.tanh() * o).sum() for o in outputs)
            results.append((outputs, torch.autograd.grad(loss, leaves, allow_unused=True)))
        for tensor in leaves:
            tensor.requires_grad_(False)
        (one, grads), (other, right) = results
        assert one[0].shape == (BATCH, 2, WIDTH)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert any(g is not None and g.abs().max() > 1e-3 for g in right)
        for grad, expected in zip(grads, right, strict=True):
            assert (grad is None) == (expected is None)
            assert grad is None or distance(grad, expected) <= 1e-12


def test_gradcheck() -> None:
    found = [sources(kind) for kind in ("keys", "experts")]
    steps = [
        BlockSteps(BlockConfig(HEADS, 0.6, 0.1, 0.2, "gelu", "speed", source), weights(),
                   torch.float64, REFERENCE_SITES)
        for source, _ in found
    ]  # fmt: skip

    def function(x: Tensor, branch: Tensor, keys: Tensor, matrix: Tensor) -> Any:
        return run_blocks(steps, x, branch, [(keys,), (matrix, *found[1][1][1:])])

    inputs = [rand(BATCH, ROWS, WIDTH, seed=21), rand(BATCH, ROWS, WIDTH, seed=22)]
    inputs += [found[0][1][0], found[1][1][0]]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


@contextmanager
def backwards(saved: list[list[Any]], alive: list[list[int]]) -> Iterator[None]:
    """Record which blocks' hidden layers are alive when each block's backward begins."""
    backward = BlockSteps.backward

    def spy(self: BlockSteps, tensors: Any, *arguments: Any) -> Any:
        saved.append([weakref.ref(tensors.hidden)])
        alive.append([i for i, refs in enumerate(saved) if refs[0]() is not None])
        return backward(self, tensors, *arguments)

    BlockSteps.backward = spy  # type: ignore[method-assign]
    try:
        yield
    finally:
        BlockSteps.backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize("method", METHODS)
def test_saved_tensors_of_a_block_are_freed_after_its_backward(method: str) -> None:
    model = prompt_tune(families.build(AVERAGE), METHODS[method]).train()
    redraw_prompts(model)
    image = families.images(AVERAGE)
    saved, alive = [], []
    loss = model(image).square().sum()
    gc.disable()
    try:
        with backwards(saved, alive):
            loss.backward(retain_graph=True)
            count = len(saved)
            assert alive == [list(range(i + 1)) for i in range(count)] and count > 1
            saved.clear(), alive.clear()
            loss.backward()
        assert alive == [[i] for i in range(count)]
        assert all(refs[0]() is None for refs in saved)
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def functions(output: Tensor) -> int:
    """Count the functions of blocks in a tensor's graph."""
    seen, left, count = set(), [output.grad_fn], 0
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += type(node).__name__ == "_BlocksBackward"
        left += [other for other, _ in node.next_functions]
    return count


@pytest.mark.parametrize("method", METHODS)
def test_under_hooks_on_saved_tensors_each_block_saves_before_the_next(method: str) -> None:
    """Hooks that offload or recompute receive a block's saved tensors before the next one runs."""
    model = prompt_tune(families.build(AVERAGE), METHODS[method]).train()
    redraw_prompts(model)
    image = families.images(AVERAGE)
    torch.manual_seed(1)
    right = model(image)
    expected = tuned_gradients(model, right)
    assert functions(model(image)) == 1
    packed: list[int] = []
    ran: list[int] = []
    forward = BlockSteps.forward

    def spy(self: BlockSteps, *arguments: Any) -> Any:
        ran.append(len(packed))
        return forward(self, *arguments)

    def pack(tensor: Tensor) -> Tensor:
        packed.append(1)
        return tensor

    BlockSteps.forward = spy  # type: ignore[method-assign]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            assert functions(model(image)) == (2 if method == "late" else 3)
    finally:
        BlockSteps.forward = forward  # type: ignore[method-assign]
    assert ran[0] < ran[1] < ran[2] or (method == "late" and ran[1] < ran[2])

    def elsewhere() -> Tensor:
        with save_on_cpu():
            return model(image)

    for how in (elsewhere, lambda: checkpoint(model, image, use_reentrant=False)):
        torch.manual_seed(1)
        output = how()
        assert distance(output, right) == 0
        for name, grad in tuned_gradients(model, output).items():
            assert distance(grad, expected[name]) <= 1e-12, name


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_blocks_in_a_row_save_what_single_blocks_save(method: str, memory: str) -> None:
    model = prompt_tune(families.build(AVERAGE), METHODS[method], memory=memory).train()
    image = families.images(AVERAGE)

    def saved(output: Tensor) -> int:
        """Return the bytes that all functions of blocks and of prompt_kv have saved."""
        storages, seen, left = {}, set(), [output.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [other for other, _ in node.next_functions]
            if type(node).__name__ in ("_BlocksBackward", "_PromptKVBackward"):
                for tensor in node.saved_tensors:
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    together = model(image)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        apart = model(image)
    assert functions(together) == 1 < functions(apart)
    assert saved(together) == saved(apart) > 0


# --- the rows that the head reads ------------------------------------------------------------


def _hook(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))


seen: list[Any] = []
LOOKS = {
    "norm": lambda model: _hook(model.norm),
    "inside": lambda model: _hook(model.blocks[-1].mlp.fc1),
    "blocks": lambda model: _hook(model.blocks),
    "pre": lambda model: model.head.register_forward_pre_hook(lambda *_: None),
    "backward": lambda model: model.norm.register_full_backward_hook(lambda *_: None),
    "forward": lambda model: vars(model.norm).update(forward=model.norm.forward),
    "replaced": lambda model: _hook_of_another(model),
    "pool": lambda model: model.reset_classifier(5, "avg"),
}  # fmt: skip


def _hook_of_another(model: Any) -> None:
    """Replace the norm by a module that has a hook already."""
    norm = nn.LayerNorm(model.norm.weight.shape, eps=model.norm.eps, dtype=model.norm.weight.dtype)
    norm.load_state_dict(model.norm.state_dict())
    _hook(norm)
    model.norm = norm.requires_grad_(False)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("look", LOOKS)
def test_hooks_after_a_first_call_see_all_rows(look: str, times: int) -> None:
    model = prompt_tune(families.build(TOKEN), VPTDeep(3)).eval()
    image = families.images(TOKEN)
    with torch.no_grad():
        for _ in range(times):
            model(image)
        assert model._rows_read() == 1
        seen.clear()
        handle = LOOKS[look](model)
        assert model._rows_read() is None
        assert model(image).isfinite().all()
        if look in ("norm", "inside", "blocks", "replaced"):
            assert look == "inside" or [shape[1] for shape in seen] == [10]
        if hasattr(handle, "remove"):
            handle.remove()
            assert model._rows_read() == 1
