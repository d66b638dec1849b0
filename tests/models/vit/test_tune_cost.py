"""Skipped work: dead rows are not computed, and autograd starts at the first prompt.

Counted in floating-point operations of the matrix products that torch dispatches, and in bytes that
autograd saves; never in seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import Plain, pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vpt_fast import VPTDeep, VPTShallow, prompt_tune
from vpt_fast.models.attention_inputs import attention_tokens
from vpt_fast.models.isotropic import attention as prompted_attention

BATCH, TOKENS, WIDTH, DEPTH = 8, 10, 64, 4
LINEAR = 2 * WIDTH * WIDTH  # operations of one row through a width x width matrix


class Products(TorchDispatchMode):
    """A counter of floating-point operations of matrix products.

    `linear` counts those of Linear layers, `batched` attention's; fused attention operators are
    not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a.shape for a in args if isinstance(a, Tensor)]
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            (rows, inner), (_, columns) = tensors[-2:]
            self.linear += 2 * rows * inner * columns
        if func._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            (batch, rows, inner), (_, _, columns) = tensors[-2:]
            self.batched += 2 * batch * rows * inner * columns
        return func(*args, **(kwargs or {}))


def operations(call: Any, *arguments: Any) -> int:
    """Count the floating-point operations of the Linear layers in a call."""
    with Products() as counter:
        call(*arguments)
    assert counter.linear > 0
    return counter.linear


def tuned(method: Any, family: str = TOKEN) -> nn.Module:
    return prompt_tune(families.build(family, dtype=torch.float32), method)


def image(family: str = TOKEN) -> Tensor:
    return families.images(family, batch=BATCH, dtype=torch.float32)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_dead_prompt_rows_cost_kv_only(shared: bool, grad: bool) -> None:
    """p rows through W_k and W_v, once for the batch: 2 p D^2 multiply-adds per block."""
    p = 20
    with torch.set_grad_enabled(grad):
        base = operations(tuned(VPTDeep(0)).train().forward_features, image())
        more = operations(tuned(VPTDeep(p, shared=shared)).train().forward_features, image())
    assert more - base <= DEPTH * 2 * p * LINEAR


def test_prompt_dropout_costs_kv_per_image() -> None:
    p = 20
    base = operations(tuned(VPTDeep(0)).train().forward_features, image())
    more = operations(tuned(VPTDeep(p, dropout=0.5)).train().forward_features, image())
    assert more - base <= DEPTH * 2 * BATCH * p * LINEAR


@pytest.mark.parametrize("method", [VPTDeep(3), VPTShallow(3), VPTDeep(3, blocks=[0])])
@pytest.mark.parametrize(
    ("family", "depth", "queries"),
    [(TOKEN, 4, 1), ("deit_distilled", 3, 2), ("token_fc_norm", 3, 1), ("dinov2_registers", 3, 1)],
)
def test_last_block_computes_the_rows_that_the_head_reads(
    family: str, depth: int, queries: int, method: Any
) -> None:
    """Query, proj and MLP (1 + 1 + 8 square matrices) of every other row are skipped."""
    model = tuned(method, family).eval()
    assert len(model.blocks) == depth
    with torch.no_grad():
        whole = operations(lambda x: model.forward_head(model.forward_features(x)), image(family))
        skipped = whole - operations(model, image(family))
        tokens = model.forward_features(image(family)).shape[1]
    assert skipped >= BATCH * (tokens - queries) * 10 * LINEAR


@pytest.mark.parametrize("family", ["mae", "siglip_map", "all_tokens", "prr_pool"])
def test_no_patch_query_is_skipped_when_patches_are_read(family: str) -> None:
    model = tuned(VPTDeep(3), family).eval()
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        whole = operations(lambda x: model.forward_head(model.forward_features(x)), image(family))
        skipped = whole - operations(model, image(family))
    rows = BATCH * prefix * 12 * 2 * model.embed_dim**2 * 1.5
    assert 0 <= skipped <= rows


def test_rows_live_where_they_must() -> None:
    """In VPT-Shallow the prompts pass through every block but for the last block's queries."""
    p = 20
    with torch.no_grad():
        base = operations(tuned(VPTShallow(0)).forward_features, image())
        more = operations(tuned(VPTShallow(p)).forward_features, image())
    row = BATCH * p * 12 * LINEAR
    assert more - base >= (DEPTH - 2) * row
    assert more - base <= DEPTH * row


def test_a_training_step_is_cheaper_than_the_plain_one() -> None:
    """Forward and backward take far fewer operations than the plain formulation's."""
    model, plain = pair(families.build(TOKEN, dtype=torch.float32), VPTDeep(20))
    model.train()

    def step(call: Any) -> None:
        call(image()).square().sum().backward()

    assert operations(step, model) < 0.5 * operations(step, plain)


@pytest.mark.parametrize("first", range(DEPTH))
def test_no_autograd_below_the_first_prompt(first: int) -> None:
    model = tuned(VPTDeep(3, blocks=[first])).train()
    seen: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.update({index: output})
        )
    model(image()).sum().backward()
    assert {index for index, output in seen.items() if output.requires_grad} == set(
        range(first, DEPTH)
    )
    assert all(seen[index].grad_fn is None for index in range(first))


def test_no_token_gradient_in_the_first_prompted_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and kv of its tokens are constants: gradients flow to prompts only."""
    model = tuned(VPTDeep(3, blocks=[1, 2, 3])).train()
    seen: dict[Any, list[Tensor]] = {}

    def noting(attn: Any, *args: Any) -> list[Tensor]:
        return seen.setdefault(attn, attention_tokens(attn, *args))

    monkeypatch.setattr(prompted_attention, "attention_tokens", noting)
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: None)  # so that it runs module by module
    model(image()).sum().backward()
    (first,), (second,) = (seen[model.blocks[index].attn] for index in (1, 2))
    assert first.shape[:2] == second.shape[:2] == (BATCH, TOKENS)
    assert not first.requires_grad and second.requires_grad


def saved_bytes(call: Any) -> int:
    """Return the bytes of distinct storages saved for backward, without parameters and buffers."""
    owned = {p.untyped_storage().data_ptr() for p in (*call.parameters(), *call.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(image())
    assert output.requires_grad
    return sum(found.values())


def test_memory_saved_for_backward() -> None:
    """None below the first prompted block, and none for dead prompt rows."""
    every = saved_bytes(tuned(VPTDeep(3)).train())
    last = saved_bytes(tuned(VPTDeep(3, blocks=[DEPTH - 1])).train())
    linear = saved_bytes(tuned(VPTDeep(0, blocks=[DEPTH - 1])).train())
    many = saved_bytes(tuned(VPTDeep(23)).train())
    assert last < 0.3 * every
    assert linear <= last
    one_row = WIDTH * 4
    # Per block: normed prompts, keys and values (4 rows), the softmax sums; not one row per image.
    assert many - every < DEPTH * 20 * 8 * one_row


def test_the_plain_formulation_saves_more() -> None:
    model, plain = pair(families.build(TOKEN, dtype=torch.float32), VPTDeep(20))
    assert isinstance(plain, Plain)

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain.model

        def forward(self, x: Tensor) -> Tensor:
            return plain(x)

    assert saved_bytes(model.train()) < 0.5 * saved_bytes(Twin())
