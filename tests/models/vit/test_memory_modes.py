"""Bytes that each memory mode saves for backward, and equal results of all modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import assert_same, distance, pair, tuned_gradients
from support.formulations.plain_vapt import ACTING, STILL, seeded, vapt_pair
from support.unchanged import assert_unchanged, snapshot
from torch import Tensor, nn

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune, remove_prompts
from vpt_fast.ops.memory_modes import MEMORY_MODES

ROWS = {"speed": 10, "balanced": 6, "lean": 3, "minimal": 1}  # of D channels, per token and block
BATCH, TOKENS, WIDTH, HEADS, PROMPTS = 4, 10, 64, 2, 3
METHODS: dict[str, Any] = {
    "linear": LinearProbe(),
    "shallow": VPTShallow(PROMPTS, dropout=0.4),
    "deep": VPTDeep(PROMPTS, dropout=0.4),
    "gaps": VPTDeep(PROMPTS, dropout=0.4, blocks=[0, 2]),
    "late": VPTDeep(PROMPTS, shared=True, project_dim=6, blocks=[1, 2]),
    "code": VAPT(PROMPTS, **ACTING),
}


def tune(method: Any, memory: str, family: str = AVERAGE, **overrides: Any) -> Any:
    """Return a tuned model in training mode with its plain formulation."""
    base = families.build(family, **overrides)
    if isinstance(method, VAPT):
        tuned, plain = vapt_pair(base, method, memory=memory)
    else:
        tuned, plain = pair(base, method, memory)
    plain.training = True
    return tuned.train(), plain


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Return the bytes of distinct storages that a call saves for backward, without parameters."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}  # holds the tensors, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in owned)


def saved_by_a_block(
    method: Any, memory: str, dtype: torch.dtype, family: str = AVERAGE, **overrides: Any
) -> int:
    """Return the bytes that one more block in the middle of the model saves."""
    image = families.images(family, batch=BATCH, dtype=dtype)
    sums = []
    for depth in (3, 4):
        base = families.build(family, dtype=dtype, depth=depth, **overrides)
        model = prompt_tune(base, method, memory=memory).train()
        sums.append(saved_bytes(model, lambda model=model: model(image)))
    return sums[1] - sums[0]


def statistics(extra: int = 0, tokens: int = TOKENS) -> int:
    """Count a block's statistics: mean and rstd of two norms, and every head's log-sum-exp."""
    return BATCH * tokens * (2 + extra) + BATCH * tokens * 2 + BATCH * HEADS * tokens


def shared_prompts(dtype: torch.dtype) -> int:
    """Return the bytes of prompt_kv of one image, with their norm's statistics."""
    return 2 * PROMPTS * WIDTH * dtype.itemsize + 2 * PROMPTS * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"init_values": 1.0}], ids=["", "layer_scale"])
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_of_vpt(memory: str, overrides: Any, dtype: torch.dtype) -> None:
    row = BATCH * TOKENS * WIDTH * dtype.itemsize
    found = saved_by_a_block(VPTDeep(PROMPTS), memory, dtype, **overrides)
    numbers = statistics() if memory != "minimal" else 2 * BATCH * TOKENS
    assert found == ROWS[memory] * row + 4 * numbers + shared_prompts(dtype)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_of_prompt_dropout(memory: str) -> None:
    """A mask of booleans; and prompt_kv, now per image, in "speed" only."""
    found = saved_by_a_block(VPTDeep(PROMPTS, dropout=0.5), memory, torch.float32)
    still = saved_by_a_block(VPTDeep(PROMPTS), memory, torch.float32)
    mask, prompts = BATCH * PROMPTS * WIDTH, shared_prompts(torch.float32)
    assert found - still == mask + (BATCH * prompts if memory == "speed" else 0) - prompts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_of_vapt(memory: str, dtype: torch.dtype) -> None:
    """Every mode also saves the token mixing's output (B, p, D) in fp32 and the mixing weight."""
    row = BATCH * TOKENS * WIDTH * dtype.itemsize
    found = saved_by_a_block(VAPT(PROMPTS, **STILL), memory, dtype)
    numbers = statistics(1) if memory != "minimal" else 3 * BATCH * TOKENS
    mix = BATCH * PROMPTS * WIDTH + PROMPTS * 9 + PROMPTS
    assert found == ROWS[memory] * row + 4 * (numbers + mix)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_of_live_rows(memory: str) -> None:
    """Live prompt rows count as tokens."""
    tokens = TOKENS + PROMPTS
    row = BATCH * tokens * WIDTH * 4
    found = saved_by_a_block(VPTShallow(PROMPTS), memory, torch.float32)
    numbers = statistics(tokens=tokens) if memory != "minimal" else 2 * BATCH * tokens
    assert found == ROWS[memory] * row + 4 * numbers


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_under_autocast(memory: str) -> None:
    """The residual stream (input, sum after attention) is fp32, the rest bf16."""
    image = families.images(AVERAGE, batch=BATCH, dtype=torch.float32)
    sums = []
    for depth in (3, 4):
        base = families.build(AVERAGE, dtype=torch.float32, depth=depth)
        model = prompt_tune(base, VPTDeep(PROMPTS), memory=memory).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums.append(saved_bytes(model, lambda model=model: model(image)))
    wide = {"minimal": 1}.get(memory, 2)
    row = BATCH * TOKENS * WIDTH
    numbers = statistics() if memory != "minimal" else 2 * BATCH * TOKENS
    expected = row * (4 * wide + 2 * (ROWS[memory] - wide)) + 4 * numbers
    assert sums[1] - sums[0] == expected + shared_prompts(torch.bfloat16)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_bytes_of_a_gated_mlp(memory: str) -> None:
    """Its hidden layer has both halves, here 3 D channels, and is saved in mode "speed" only."""
    found = saved_by_a_block(VPTDeep(PROMPTS), memory, torch.float32, family="dinov2_swiglu")
    rows = {**ROWS, "speed": 6 + 3}[memory]
    numbers = statistics() if memory != "minimal" else 2 * BATCH * TOKENS
    row = BATCH * TOKENS * WIDTH * 4
    assert found == rows * row + 4 * numbers + shared_prompts(torch.float32)


@pytest.mark.parametrize("memory", MEMORY_MODES[1:])
def test_bytes_of_what_is_not_fused(memory: str) -> None:
    """One row, the block's input, in every mode but "speed"."""
    family = "qk_norm"
    image, sums = families.images(family, batch=BATCH, dtype=torch.float32), []
    for depth in (3, 4):
        base = families.build(family, dtype=torch.float32, depth=depth, global_pool="avg")
        model = prompt_tune(base, VPTDeep(PROMPTS), memory=memory).train()
        sums.append(saved_bytes(model, lambda model=model: model(image)))
    row = BATCH * TOKENS * WIDTH * 4
    assert row <= sums[1] - sums[0] <= row + 4 * PROMPTS * WIDTH


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_nothing_is_saved_without_autograd(memory: str) -> None:
    """Below the first prompt, and everywhere in a linear probe."""
    image = families.images(AVERAGE, batch=BATCH, dtype=torch.float32)
    for method, blocks in ((LinearProbe(), 0), (VPTDeep(PROMPTS, blocks=[3]), 1)):
        base = families.build(AVERAGE, dtype=torch.float32, depth=4)
        model = prompt_tune(base, method, memory=memory).train()
        saved = saved_bytes(model, lambda model=model: model(image))
        assert saved < (blocks * ROWS[memory] + 2) * (BATCH * TOKENS * WIDTH * 4)


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_checkpointing_is_minimal(memory: str, method: str) -> None:
    """timm's switch gives the bytes of "minimal", and the gradients and masks of the mode."""
    tuned, plain = tune(METHODS[method], memory)
    least, _ = tune(METHODS[method], "minimal")
    image = families.images(AVERAGE, batch=BATCH)
    expected = seeded(plain, image)
    tuned.set_grad_checkpointing(True)
    assert saved_bytes(tuned, lambda: tuned(image)) == saved_bytes(least, lambda: least(image))
    output = seeded(tuned, image)
    torch.manual_seed(99)
    assert_same(tuned, plain, output, expected)
    tuned.set_grad_checkpointing(False)
    fresh, _ = tune(METHODS[method], memory)
    assert saved_bytes(tuned, lambda: tuned(image)) == saved_bytes(fresh, lambda: fresh(image))


@pytest.mark.parametrize("method", METHODS)
def test_modes_differ_in_memory_alone(method: str) -> None:
    """Outputs and gradients have the same bits: recomputation uses the same operations."""
    image, results, sizes = families.images(TOKEN, dtype=torch.float32), [], []
    for memory in MEMORY_MODES:
        tuned, _ = tune(METHODS[method], memory, TOKEN, dtype=torch.float32)
        output = seeded(tuned, image)
        torch.manual_seed(99)
        results.append([output, *tuned_gradients(tuned, output).values()])
        sizes.append(saved_bytes(tuned, lambda tuned=tuned: tuned(image)))
    assert method == "linear" or sizes == sorted(set(sizes), reverse=True)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.covering
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("method", ["deep", "code"])
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_copies_keep_the_mode(memory: str, method: str, duplicate: Any) -> None:
    tuned, plain = tune(METHODS[method], memory)
    image = families.images(AVERAGE, batch=BATCH)
    seeded(tuned, image).sum().backward()
    twin = duplicate(tuned)
    size = saved_bytes(tuned, lambda: tuned(image))
    expected = seeded(plain, image)
    for block in tuned.blocks:
        block.memory = "speed"
    assert saved_bytes(twin, lambda: twin(image)) == size
    output = seeded(twin, image)
    assert_same(twin, plain, output, expected)


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_remove_prompts_restores_everything(memory: str, method: str) -> None:
    base, image = families.build(AVERAGE, init_values=1.0), families.images(AVERAGE)
    base.train()
    base.blocks[1].eval()
    base.blocks[0].mlp.fc1.bias.requires_grad_(False)
    before, output = snapshot(base), base.eval()(image)
    base.train()
    base.blocks[1].eval()
    tuned = prompt_tune(base, METHODS[method], memory=memory)
    tuned.train()(image).square().sum().backward()
    assert remove_prompts(tuned.eval()) is base
    assert_unchanged(base, before)
    assert torch.equal(base.eval()(image), output)


@pytest.mark.parametrize("value", ["fast", "", "Speed", None, 3, True])
def test_unknown_modes_are_refused_by_value(value: Any) -> None:
    base = families.build(TOKEN)
    before = snapshot(base)
    with pytest.raises(ValueError) as raised:
        prompt_tune(base, VPTDeep(3), memory=value)
    assert repr(value) in str(raised.value)
    assert all(mode in str(raised.value) for mode in MEMORY_MODES)
    assert_unchanged(base, before)


def test_modes_are_distances_apart() -> None:
    """The comparisons above notice other dropout masks: another seed's output is far away."""
    tuned, _ = tune(METHODS["deep"], "lean")
    image = families.images(AVERAGE)
    assert distance(seeded(tuned, image), seeded(tuned, image, seed=5)) > 1e-3
