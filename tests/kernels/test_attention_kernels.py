"""Prompt attention's kernels against softmax attention over a real concatenation, in fp64.

A kernel may be no further from fp64 than plain PyTorch in the same dtype, plus about one rounding
of the result.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.grids import cover
from support.kernels.on_device import differs_by_one_rounding

from vpt_fast.kernels.attention.launches import attention_backward, attention_forward
from vpt_fast.kernels.attention.layouts import split, split_prompts

pytest_plugins = ("support.kernels.kernel_device",)

TOKENS = (1, 17, 50, 197, 257)
PROMPTS = (0, 1, 5, 10, 50, 100, 200)
HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Case:
    """One problem; `layout` is how tokens and prompts are packed: packed, kv or apart."""

    tokens: int
    prompts: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    queries: int | None = None
    batch: int = 2
    heads: int = 1
    layout: str = "packed"
    shared: bool = True

    def __str__(self) -> str:
        name = f"N{self.tokens}-p{self.prompts}-d{self.head_dim}-{str(self.dtype)[6:]}"
        name += f"-M{self.queries}" if self.queries else ""
        name += f"-B{self.batch}" if self.batch != 2 else ""
        name += f"-{self.layout}" if self.layout != "packed" else ""
        return name + ("" if self.shared else "-per_image")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Problem:
    """Tensors of a case: inputs of the kernels, and the gradient of their output."""

    tokens: list[torch.Tensor]
    prompts: list[torch.Tensor]
    grad_out: torch.Tensor


def make_problem(case: Case, device: torch.device) -> Problem:
    """Return random tensors, the same for the same case on every device."""
    generator = torch.Generator().manual_seed(case.tokens * 1000 + case.prompts)

    def rand(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(case.dtype).to(device)

    rows, heads, dim = case.queries or case.tokens, case.heads, case.head_dim
    images = 1 if case.shared else case.batch
    if case.layout == "packed":
        tokens = [rand(case.batch, case.tokens, 3, heads, dim)]
    elif case.layout == "kv":
        tokens = [rand(case.batch, rows, heads, dim), rand(case.batch, case.tokens, 2, heads, dim)]
    else:  # q and k as a norm over heads leaves them: (B, H, rows, d) in memory
        q = rand(case.batch, heads, rows, dim).transpose(1, 2)
        k = rand(case.batch, heads, case.tokens, dim).transpose(1, 2)
        tokens = [q, k, rand(case.batch, case.tokens, 3, heads, dim)[:, :, 2]]
    if case.layout == "apart":
        prompts = [rand(images, case.prompts, heads, dim) for _ in range(2)]
    else:
        prompts = [rand(images, case.prompts, 2, heads, dim)]
    return Problem(tokens, prompts, rand(case.batch, rows, heads * dim))


def eager(problem: Problem, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Compute attention by concatenation in `dtype`, and gradients by autograd."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in split(problem.tokens)]
    pair = split_prompts(problem.prompts)
    assert pair is not None
    leaves += [t.detach().to(dtype).requires_grad_() for t in pair]
    q, k, v, prompt_k, prompt_v = leaves
    keys = torch.cat([prompt_k.expand(case.batch, -1, -1, -1), k], 1).transpose(1, 2)
    values = torch.cat([prompt_v.expand(case.batch, -1, -1, -1), v], 1).transpose(1, 2)
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) * case.scale
    out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    grads = torch.autograd.grad(out, leaves, problem.grad_out.to(dtype))
    names = ("dq", "dk", "dv", "prompt_dk", "prompt_dv")
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def kernels(
    problem: Problem, case: Case, needs_tokens: bool = True, needs_prompts: bool = True
) -> dict[str, torch.Tensor]:
    """Compute results and needed gradients by the kernels, and lse."""
    out, lse = attention_forward(problem.tokens, problem.prompts, case.scale)
    assert out.is_contiguous() and out.dtype == case.dtype and lse.dtype == torch.float32
    tokens, prompts = attention_backward(
        problem.tokens,
        problem.prompts,
        out,
        lse,
        problem.grad_out,
        case.scale,
        needs_tokens,
        needs_prompts,
    )
    results = {"out": out, "lse": lse}
    for asked, grads, inputs in (
        (needs_tokens, tokens, problem.tokens),
        (needs_prompts, prompts, problem.prompts),
    ):
        assert [g.shape for g in grads] == ([t.shape for t in inputs] if asked else [])
        assert all(g.is_contiguous() and g.dtype == case.dtype for g in grads)
    if needs_tokens:
        results.update(zip(("dq", "dk", "dv"), split(tokens), strict=True))
    if needs_prompts:
        pair = split_prompts(prompts)
        assert pair is not None
        results.update(zip(("prompt_dk", "prompt_dv"), pair, strict=True))
    return results


def saved_output_noise(problem: Problem, case: Case) -> dict[str, torch.Tensor]:
    """Return the RMS effect on each gradient of one rounding of the saved output.

    The kernels compute rowsum(grad_out * out) from the rounded output, plain PyTorch from exact
    values. With very few keys the gradients are differences so small that this rounding shows.
    """
    q, k, v = (t.double() for t in split(problem.tokens))
    pair = split_prompts(problem.prompts)
    assert pair is not None
    prompt_k, prompt_v = (t.double().expand(case.batch, -1, -1, -1) for t in pair)
    keys, values = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
    probs = (torch.einsum("bmhd,bnhd->bhmn", q, keys) * case.scale).softmax(-1)
    out = torch.einsum("bhmn,bnhd->bhmd", probs, values)
    grad_out = problem.grad_out.double().view(q.shape).transpose(1, 2)
    row = (grad_out * out).square().sum(-1).sqrt() * case.scale
    dq = row[..., None] * torch.einsum("bhmn,bnhd->bhmd", probs, keys).abs()
    squares = torch.einsum("bhmn,bhm,bmhd->bnhd", probs.square(), row.square(), q.square())
    prompts, tokens = squares.split([case.prompts, case.tokens], 1)
    prompts = prompts.sum(0) if case.shared else prompts
    return {"dq": dq, "dk": tokens.sqrt(), "prompt_dk": prompts.sqrt()}


def assert_as_exact_as_eager(case: Case, device: torch.device, **needs: bool) -> None:
    """Assert largest and RMS errors against fp64 within eager's own, plus some roundings."""
    problem = make_problem(case, device)
    actual = kernels(problem, case, **needs)
    truth = eager(problem, case, torch.float64)
    budget = eager(problem, case, case.dtype)
    noise = saved_output_noise(problem, case)
    epsilon = torch.finfo(case.dtype).eps
    for name, values in actual.items():
        if name == "lse" or not values.numel():
            continue
        exact = truth[name]
        error, allowed = (t.double() - exact for t in (values, budget[name]))
        size = exact.abs().max() + (noise[name].max() if name in noise else 0.0)
        slack = MAX_SLACK[case.dtype] * epsilon * size
        assert error.abs().max() <= allowed.abs().max() + slack, name
        rms = RMS_SLACK[case.dtype] * epsilon * size
        assert error.square().mean().sqrt() <= allowed.square().mean().sqrt() + rms, name


# In units in the last place of 1 (eps), of a tensor's largest value. For 16-bit dtypes the slack is
# the rounding of the result itself, half a unit, or half of that rounding's RMS. In fp32 sums in
# another order differ by a few units, and 2**(score - lse), which the backward pass recomputes,
# loses as many as its exponent, 10 to 20.
MAX_SLACK = {torch.float32: 16.0, torch.float16: 0.5, torch.bfloat16: 0.5}
RMS_SLACK = {torch.float32: 3.0, torch.float16: 0.15, torch.bfloat16: 0.15}


PAIRED = [("tokens", "prompts"), ("prompts", "dtype"), ("head_dim", "dtype"), ("tokens", "dtype")]


def covering() -> list[Case]:
    """Return few and cheap cases in which all values of each pair in `PAIRED` occur together.

    What head dimensions choose, tiles, meets every number of tokens and prompts in the whole grid.
    """
    grid = [Case(*values) for values in itertools.product(TOKENS, PROMPTS, HEAD_DIMS, DTYPES)]
    cases = cover({case: _pairs(case) for case in grid}, _seconds)
    return [replace(case, shared=index % 2 == 0) for index, case in enumerate(cases)]


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(pair, *(getattr(case, name) for name in pair)) for pair in PAIRED}


def _seconds(case: Case) -> float:
    """Return about ttsem's time: compilation, and products, in fp32 one after the other."""
    products = case.tokens * (case.tokens + case.prompts) * case.head_dim
    return 0.5 + products * (1e-6 if case.dtype == torch.float32 else 5e-8)


GRID = [
    Case(*values, shared=shared)
    for *values, shared in itertools.product(TOKENS, PROMPTS, HEAD_DIMS, DTYPES, (True, False))
    if shared or values[1]
]
ids = str


@pytest.mark.parametrize("case", covering(), ids=ids)
def test_as_exact_as_eager(case: Case, kernel_device: torch.device) -> None:
    assert_as_exact_as_eager(case, kernel_device)


@pytest.mark.full
@pytest.mark.parametrize("case", GRID, ids=ids)
def test_as_exact_as_eager_grid(case: Case, kernel_device: torch.device) -> None:
    assert_as_exact_as_eager(case, kernel_device)


LAYOUTS = [
    Case(17, 5, 64, queries=1, layout="kv"),
    Case(197, 10, 64, queries=1, layout="kv", heads=2),
    Case(197, 50, 80, queries=2, layout="kv", shared=False),
    Case(50, 5, 64, queries=1, layout="apart", dtype=torch.float16),
    Case(50, 10, 72, layout="apart", heads=3),
    Case(197, 50, 64, layout="apart", heads=2, shared=False),
    Case(197, 10, 64, layout="packed", heads=3, batch=3),
    Case(50, 10, 64, batch=1, dtype=torch.float32),
    Case(50, 10, 64, batch=1, queries=1, layout="kv"),
    Case(20, 7, 33, heads=2),
    Case(20, 7, 8, heads=2, layout="apart"),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=ids)
def test_layouts(case: Case, kernel_device: torch.device) -> None:
    """Packed, apart, fewer queries than keys, odd batches and odd head dimensions."""
    assert_as_exact_as_eager(case, kernel_device)


@pytest.mark.parametrize(
    "case",
    [
        Case(17, 5, 32, batch=67),
        Case(7, 5, 64, batch=33, dtype=torch.float16, layout="apart"),
        Case(17, 5, 32, batch=67, queries=1, layout="kv"),
        Case(17, 20, 32, batch=40, queries=2, layout="kv"),
        Case(5, 5, 64, batch=200),
        Case(19, 5, 64, batch=65, heads=2, layout="apart"),
    ],
    ids=ids,
)
def test_batches_of_many_chunks(case: Case, kernel_device: torch.device) -> None:
    """The gradient of shared prompts is summed over chunks of several images, the last shorter.

    A step over queries goes from one image to the next, or to the one after several.
    """
    assert_as_exact_as_eager(case, kernel_device)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("tokens", "prompts"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(
    tokens: bool, prompts: bool, shared: bool, kernel_device: torch.device
) -> None:
    """Some gradients alone equal those computed together.

    Bit for bit, except for prompts without tokens, where another kernel computes delta.
    """
    case = Case(50, 10, 64, shared=shared)
    problem = make_problem(case, kernel_device)
    whole = kernels(problem, case)
    part = kernels(problem, case, needs_tokens=tokens, needs_prompts=prompts)
    expected = {"out", "lse"}
    expected |= {"dq", "dk", "dv"} if tokens else set()
    expected |= {"prompt_dk", "prompt_dv"} if prompts else set()
    assert set(part) == expected
    for name, values in part.items():
        same = torch.equal if tokens or name in ("out", "lse") else differs_by_one_rounding
        assert same(values, whole[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """lse is the base-2 logarithm of the sum of exp(scale * score), to the dtype's rounding."""
    case = Case(50, 10, 64, dtype)
    problem = make_problem(case, kernel_device)
    _, lse = attention_forward(problem.tokens, problem.prompts, case.scale)
    q, k, _ = (t.double() for t in split(problem.tokens))
    prompt_k = problem.prompts[0][:, :, 0].double().expand(case.batch, -1, -1, -1)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, torch.cat([prompt_k, k], 1)) * case.scale
    exact = scores.logsumexp(-1) * LOG2_E
    tolerance = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)
    assert (lse.double() - exact).abs().max() <= tolerance


@pytest.mark.parametrize("shared", [True, False])
def test_same_inputs_same_bits(shared: bool, kernel_device: torch.device) -> None:
    case = Case(50, 10, 64, batch=35, shared=shared)
    first, second = (kernels(make_problem(case, kernel_device), case) for _ in range(2))
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize("shared", [True, False])
def test_an_image_does_not_depend_on_its_batch(shared: bool, kernel_device: torch.device) -> None:
    """Results and gradients of one image are the same bits in any batch."""
    case = Case(50, 10, 64, batch=5, shared=shared)
    problem = make_problem(case, kernel_device)
    images = slice(3, 4)
    alone = Problem(
        [t[images] for t in problem.tokens],
        problem.prompts if shared else [t[images] for t in problem.prompts],
        problem.grad_out[images],
    )
    together, single = kernels(problem, case), kernels(alone, replace(case, batch=1))
    for name, values in single.items():
        if not (shared and name.startswith("prompt")):
            assert torch.equal(values, together[name][images]), name


def test_no_prompts_at_all(kernel_device: torch.device) -> None:
    """An empty list of prompts is p = 0."""
    case = Case(50, 0, 64)
    problem = make_problem(case, kernel_device)
    expected, _ = attention_forward(problem.tokens, problem.prompts, case.scale)
    out, lse = attention_forward(problem.tokens, [], case.scale)
    assert torch.equal(out, expected)
    grads, none = attention_backward(
        problem.tokens, [], out, lse, problem.grad_out, case.scale, True, True
    )
    assert len(grads) == 1 and none == []


@pytest.mark.parametrize("shared", [True, False])
def test_empty_batch(shared: bool, kernel_device: torch.device) -> None:
    """No images: empty results; the gradient of shared prompts is 0."""
    case = Case(17, 5, 64, batch=0, shared=shared)
    results = kernels(make_problem(case, kernel_device), case)
    for name, values in results.items():
        if shared and name.startswith("prompt"):
            assert not values.any()
        else:
            assert values.numel() == 0


@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_rows(offset: int, kernel_device: torch.device) -> None:
    """Tensors whose rows are not aligned to 16 bytes."""
    case = Case(20, 7, 32)
    problem = make_problem(case, kernel_device)
    expected = kernels(problem, case)
    for tensors in (problem.tokens, problem.prompts):
        for index, tensor in enumerate(tensors):
            memory = torch.zeros(tensor.numel() + offset, dtype=case.dtype, device=kernel_device)
            tensors[index] = memory[offset:].view(tensor.shape).copy_(tensor)
    for name, values in kernels(problem, case).items():
        assert differs_by_one_rounding(values, expected[name]), name


@pytest.mark.parametrize(
    "case",
    [
        Case(197, 10, 64),
        Case(197, 50, 64, dtype=torch.float16),
        Case(197, 50, 80, shared=False),
        Case(257, 200, 128),
        Case(50, 10, 64, dtype=torch.float32),
    ],
    ids=ids,
)
def test_sm80(case: Case, kernel_device_sm80: torch.device) -> None:
    """The launch table chooses other tiles for an A100."""
    assert_as_exact_as_eager(case, kernel_device_sm80)


def test_extreme_scores_stay_finite(kernel_device: torch.device) -> None:
    """Scores far below and far above 0, whose exponentials alone would under- and overflow."""
    case = Case(50, 10, 64, torch.float32)
    problem = make_problem(case, kernel_device)
    for size in (-300.0, 300.0):
        q, k, _ = split(problem.tokens)
        q[..., 0], k[..., 0] = size, abs(size)
        problem.prompts[0][:, :, 0, :, 0] = abs(size)
        results = kernels(problem, case)
        assert all(values.isfinite().all() for values in results.values())


def bad_inputs() -> list[Any]:
    half = torch.float16
    qkv = torch.zeros(2, 5, 3, 2, 8)
    kv = torch.zeros(1, 3, 2, 2, 8)
    q, k = torch.zeros(2, 1, 2, 8), torch.zeros(2, 5, 2, 8)
    return [
        pytest.param([], [], 1.0, ValueError, "1, 2 or 3 tensors", id="no tokens"),
        pytest.param([qkv], [kv] * 3, 1.0, ValueError, "0, 1 or 2", id="three prompts"),
        pytest.param([qkv.double()], [], 1.0, TypeError, "float64", id="dtype"),
        pytest.param([qkv], [kv.to(half)], 1.0, TypeError, "prompt kv", id="mixed dtypes"),
        pytest.param([qkv[0]], [], 1.0, ValueError, "qkv must be", id="rank"),
        pytest.param([qkv[:, :, :2]], [], 1.0, ValueError, "qkv must be", id="not three"),
        pytest.param([qkv], [kv[:, :, :, :1]], 1.0, ValueError, "heads", id="heads"),
        pytest.param([qkv], [kv.expand(3, -1, -1, -1, -1)], 1.0, ValueError, "3", id="batch"),
        pytest.param([q, k, k[:, :4]], [], 1.0, ValueError, "v has 4 rows", id="rows"),
        pytest.param([qkv], [k[:1], k[:1, :3]], 1.0, ValueError, "prompt v", id="prompt rows"),
        pytest.param([qkv[:, :0]], [], 1.0, ValueError, "no rows", id="no keys"),
        pytest.param([torch.zeros(1, 2, 3, 1, 129)], [], 1.0, ValueError, "129", id="head dim"),
        pytest.param([qkv.transpose(3, 4)], [], 1.0, ValueError, "stride", id="stride"),
        pytest.param([qkv], [], 0.0, ValueError, "scale", id="zero scale"),
        pytest.param([qkv], [], float("nan"), ValueError, "scale", id="nan scale"),
    ]


@pytest.mark.parametrize(("tokens", "prompts", "scale", "error", "message"), bad_inputs())
def test_bad_inputs_are_named(
    tokens: list[torch.Tensor],
    prompts: list[torch.Tensor],
    scale: float,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        attention_forward(tokens, prompts, scale)


def test_bad_saved_tensors_are_named() -> None:
    tokens = [torch.zeros(2, 5, 3, 2, 8)]
    out, lse = torch.zeros(2, 5, 16), torch.zeros(2, 2, 5)
    for name, saved in (
        ("out", (out[:, :4], lse, out)),
        ("lse", (out, lse[:, :1], out)),
        ("grad_out", (out, lse, out[:1])),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            attention_backward(tokens, [], *saved, 1.0, True, True)
    with pytest.raises(TypeError, match="^lse is"):
        attention_backward(tokens, [], out, lse.half(), out, 1.0, True, True)
