"""The attention operator: its reference against textbook attention in fp64, its registration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vpt_fast.ops.attention import reference
from vpt_fast.ops.attention.operator import (
    ATTENTION_BACKWARD,
    attention_operator,
    attention_operator_backward,
    prompt_attention,
)

LAYOUTS = list(itertools.product((1, 2, 3), (0, 1, 2), (True, False)))


def make(
    layout: int,
    prompt_layout: int,
    shared: bool,
    *,
    batch: int = 2,
    keys: int = 5,
    queries: int = 3,
    heads: int = 2,
    dim: int = 4,
    prompts: int = 3,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return random tokens and prompts in one of the layouts."""
    generator = torch.Generator().manual_seed(keys + 10 * prompts + 100 * queries)

    def rand(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_(grad)

    tokens = {
        1: lambda: [rand(batch, keys, 3, heads, dim)],
        2: lambda: [rand(batch, queries, heads, dim), rand(batch, keys, 2, heads, dim)],
        3: lambda: [rand(batch, r, heads, dim) for r in (queries, keys, keys)],
    }[layout]()
    images = 1 if shared else batch
    rows = {
        0: lambda: [],
        1: lambda: [rand(images, prompts, 2, heads, dim)],
        2: lambda: [rand(images, prompts, heads, dim) for _ in range(2)],
    }[prompt_layout]()
    return tokens, rows


def textbook(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> Tensor:
    """Compute softmax(q [K_p; K_x]^T scale) [V_p; V_x] by concatenation."""
    q, k, v = tokens[0].unbind(2) if len(tokens) == 1 else (tokens[0], None, None)
    if len(tokens) == 2:
        k, v = tokens[1].unbind(2)
    elif len(tokens) == 3:
        k, v = tokens[1:]
    if prompts:
        prompt_k, prompt_v = prompts[0].unbind(2) if len(prompts) == 1 else prompts
        k = torch.cat([prompt_k.expand(k.shape[0], -1, -1, -1), k], 1)
        v = torch.cat([prompt_v.expand(v.shape[0], -1, -1, -1), v], 1)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v).flatten(2)


def gradients(function, tokens: list[Tensor], prompts: list[Tensor]) -> list[Tensor]:
    """Return the output, and gradients of a fixed random projection of it."""
    out = function(tokens, prompts, 0.3)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    inputs = [t for t in (*tokens, *prompts) if t.requires_grad]
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize(("layout", "prompt_layout", "shared"), LAYOUTS)
def test_equals_textbook_attention(layout: int, prompt_layout: int, shared: bool) -> None:
    tokens, prompts = make(layout, prompt_layout, shared)
    have = gradients(prompt_attention, tokens, prompts)
    want = gradients(textbook, tokens, prompts)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("layout", "prompt_layout", "shared"), LAYOUTS)
def test_gradcheck(layout: int, prompt_layout: int, shared: bool) -> None:
    tokens, prompts = make(layout, prompt_layout, shared, keys=3, queries=2, prompts=2, dim=2)
    assert torch.autograd.gradcheck(
        lambda *a: prompt_attention(list(a[:layout]), list(a[layout:]), 0.3), (*tokens, *prompts)
    )


@pytest.mark.parametrize(("layout", "prompt_layout", "shared"), [x for x in LAYOUTS if x[1]])
@pytest.mark.parametrize("asked", ["tokens", "prompts"])
def test_gradients_of_a_subset(layout, prompt_layout, shared, asked) -> None:
    tokens, prompts = make(layout, prompt_layout, shared)
    for tensor in prompts if asked == "tokens" else tokens:
        tensor.requires_grad_(False)
    have = gradients(prompt_attention, tokens, prompts)
    want = gradients(textbook, tokens, prompts)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("needs_tokens", "needs_prompts"), [(True, False), (False, True)])
def test_backward_computes_only_what_is_asked(monkeypatch, needs_tokens, needs_prompts) -> None:
    tokens, prompts = make(1, 1, True)
    tokens[0].requires_grad_(needs_tokens)
    prompts[0].requires_grad_(needs_prompts)
    asked = []
    backward = ATTENTION_BACKWARD.reference

    def spy(*args):
        asked.append(args[-2:])
        return backward(*args)

    monkeypatch.setattr(ATTENTION_BACKWARD, "reference", spy)
    prompt_attention(tokens, prompts, 0.3).sum().backward()
    assert asked == [(needs_tokens, needs_prompts)]


def test_nothing_is_saved_without_gradients() -> None:
    tokens, prompts = make(1, 1, True, grad=False)
    assert prompt_attention(tokens, prompts, 0.3).grad_fn is None


@pytest.mark.parametrize("prompt_layout", [0, 1, 2])
@pytest.mark.parametrize("sizes", [{"batch": 1}, {"batch": 0}, {"keys": 1}, {"prompts": 0}])
def test_small_sizes(prompt_layout: int, sizes: dict[str, int]) -> None:
    tokens, prompts = make(1, prompt_layout, True, **sizes)
    have = gradients(prompt_attention, tokens, prompts)
    want = gradients(textbook, tokens, prompts)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("layout", "prompt_layout", "shared"), LAYOUTS)
def test_formula_for_other_devices(monkeypatch, layout, prompt_layout, shared) -> None:
    """The path without the CPU's fused attention, which MPS and XPU tensors take."""
    tokens, prompts = make(layout, prompt_layout, shared, grad=False)
    out, lse = reference.attention_forward(tokens, prompts, 0.3)
    grad = torch.randn_like(out)
    flash = reference.attention_backward(tokens, prompts, out, lse, grad, 0.3, True, True)
    monkeypatch.setattr(reference, "has_flash", lambda q: False)
    plain_out, plain_lse = reference.attention_forward(tokens, prompts, 0.3)
    plain = reference.attention_backward(tokens, prompts, out, lse, grad, 0.3, True, True)
    torch.testing.assert_close(plain_out, out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(plain_lse, lse, rtol=1e-12, atol=1e-13)
    for a, b in zip([*plain[0], *plain[1]], [*flash[0], *flash[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_error_is_no_larger_than_eager(dtype: torch.dtype, shared: bool) -> None:
    """The error against fp64 is that of SDPA on concatenated keys and values in the same dtype."""
    tokens, prompts = make(1, 1, shared, batch=3, keys=37, prompts=9, dim=32, dtype=dtype)
    exact = [[t.detach().double().requires_grad_() for t in ts] for ts in (tokens, prompts)]

    def eager(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in tokens[0].unbind(2))
        pk, pv = (t.transpose(1, 2).expand(q.shape[0], -1, -1, -1) for t in prompts[0].unbind(2))
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).flatten(2)

    truth = gradients(textbook, *exact)
    slack = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for ours, plain, true in zip(
        gradients(prompt_attention, tokens, prompts),
        gradients(eager, tokens, prompts),
        truth,
        strict=True,
    ):
        size = true.abs().max()
        error = (ours.double() - true).abs().max() / size
        allowed = (plain.double() - true).abs().max() / size + slack
        assert error <= allowed, f"{error:.2e} > {allowed:.2e}"


def test_same_batch_gives_the_same_bits() -> None:
    tokens, prompts = make(1, 1, True, batch=5, keys=19, dtype=torch.float32)
    first, second = (gradients(prompt_attention, tokens, prompts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("layout", "prompt_layout", "shared"), LAYOUTS)
def test_opcheck(layout: int, prompt_layout: int, shared: bool) -> None:
    tokens, prompts = make(layout, prompt_layout, shared, dtype=torch.float32)
    torch.library.opcheck(attention_operator, (tokens, prompts, 0.3))
    tokens, prompts = make(layout, prompt_layout, shared, dtype=torch.float32, grad=False)
    out, lse = attention_operator(tokens, prompts, 0.3)
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            attention_operator_backward,
            (tokens, prompts, out, lse, torch.ones_like(out), 0.3, *asked),
        )


def test_compiles_without_a_graph_break() -> None:
    tokens, prompts = make(1, 1, True, dtype=torch.float32)
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    have = gradients(compiled, tokens, prompts)
    want = gradients(prompt_attention, tokens, prompts)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_rounds_as_sdpa_does() -> None:
    tokens, prompts = make(3, 2, True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(tokens, prompts, 0.3)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (*tokens, *prompts))


def _zeros(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("tokens", "prompts", "message"),
    [
        ([], [], "tokens must be 1, 2 or 3 tensors"),
        ([(2, 5, 2, 2, 4)], [], r"qkv must be \(B, rows, 3, H, d\)"),
        ([(2, 5, 3, 2)], [], "qkv must be"),
        ([(2, 1, 2, 4), (2, 5, 3, 2, 4)], [], r"kv must be \(B, rows, 2, H, d\)"),
        ([(2, 1, 2, 4), (3, 5, 2, 2, 4)], [], "kv has a leading dimension of 3 where q has 2"),
        ([(2, 1, 2, 4), (2, 5, 2, 4), (2, 6, 2, 4)], [], "v has 6 rows where k has 5"),
        ([(2, 5, 3, 2, 4)], [(1, 3, 3, 2, 4)], "prompt kv must be"),
        ([(2, 5, 3, 2, 4)], [(1, 3, 2, 2, 8)], "prompt kv has 2 heads of 8"),
        ([(2, 5, 3, 2, 4)], [(3, 3, 2, 2, 4)], "prompt kv has a leading dimension of 3"),
        ([(2, 5, 3, 2, 4)], [(1, 3, 2, 4)], "prompt kv must be"),
    ],
)
def test_wrong_shapes_are_named(tokens, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_attention(_zeros(*tokens), _zeros(*prompts), 0.3)


def test_mixed_dtypes_are_named() -> None:
    tokens, prompts = make(1, 1, True, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        prompt_attention(tokens, [prompts[0].double()], 0.3)
