"""Attention without keys and values against attention with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.attention.absorbed import absorbed_attention, absorbed_values
from vpt_fast.ops.attention.operator import prompt_attention

HEADS, DIM, WIDTH = 3, 4, 10


def make(queries: int, prompts: int, shared: bool, bias: bool, dtype=torch.float64) -> list:
    generator = torch.Generator().manual_seed(queries + prompts)

    def rand(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    inner = HEADS * DIM
    return [
        rand(2, queries, HEADS, DIM),
        rand(2, 7, WIDTH),
        rand(1 if shared else 2, prompts, WIDTH) if prompts else None,
        rand(inner, WIDTH),
        rand(inner, WIDTH),
        rand(inner) if bias else None,
        0.4,
    ]


def with_keys_and_values(q, rows, prompts, k_weight, v_weight, v_bias, scale) -> Tensor:
    def project(x: Tensor) -> list[Tensor]:
        # Any key bias will do: it cancels.
        bias = torch.full((HEADS * DIM,), 0.7, dtype=x.dtype)
        pair = F.linear(x, k_weight, bias), F.linear(x, v_weight, v_bias)
        return [t.unflatten(-1, (HEADS, DIM)) for t in pair]

    return prompt_attention([q, *project(rows)], [] if prompts is None else project(prompts), scale)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(("prompts", "shared"), [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_attention_with_keys_and_values(queries, prompts, shared, bias) -> None:
    inputs = make(queries, prompts, shared, bias)
    leaves = [t for t in inputs if isinstance(t, Tensor)]
    outs = [f(*inputs) for f in (absorbed_attention, with_keys_and_values)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    have, want = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_larger_than_attentions(dtype) -> None:
    inputs = make(1, 3, True, True, dtype)
    exact = [t.detach().double() if isinstance(t, Tensor) else t for t in inputs]
    truth = with_keys_and_values(*exact)
    error = (absorbed_attention(*inputs).double() - truth).abs().max()
    allowed = (with_keys_and_values(*inputs[:-1], 0.4).double() - truth).abs().max()
    assert absorbed_attention(*inputs).dtype == dtype
    assert error <= allowed + 1e-3 * truth.abs().max()


def test_autocast_does_not_reach_the_scores() -> None:
    inputs = make(1, 3, True, True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = absorbed_attention(*inputs)
    assert torch.equal(inside, absorbed_attention(*inputs))


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(("prompts", "shared"), [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_given_keys_of_any_kind(queries, prompts, shared, bias) -> None:
    q, rows, prompt, _, v_weight, v_bias, scale = make(queries, prompts, shared, bias)
    keys = make(7, 1, False, False)[0]
    prompt_k = make(3, 2, False, False)[0][: len(prompt)] if prompts else None

    def projected(x: Tensor) -> Tensor:
        return F.linear(x, v_weight, v_bias).unflatten(-1, (HEADS, DIM))

    kv = [] if prompt is None else [prompt_k, projected(prompt)]
    want = prompt_attention([q, keys, projected(rows)], kv, scale)
    have = absorbed_values(q, keys, rows, prompt_k, prompt, v_weight, v_bias, scale)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    leaves = [t for t in (q, keys, rows, prompt, prompt_k, v_weight, v_bias) if t is not None]
    have, want = (torch.autograd.grad(out.square().sum(), leaves) for out in (have, want))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
