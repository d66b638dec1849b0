"""Prompt attention's kernels against softmax attention over a real concatenation, in fp64.

A kernel may be no further from fp64 than plain PyTorch in the same dtype, plus about one rounding
of the result.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.grids import cover
from support.kernels.attention_problem import (
    Case,
    Problem,
    assert_as_exact_as_eager,
    kernels,
    make_problem,
)
from support.kernels.on_device import differs_by_one_rounding

from vpt_fast.kernels.attention.launches import attention_backward, attention_forward
from vpt_fast.kernels.attention.layouts import split

pytest_plugins = ("support.kernels.kernel_device",)

TOKENS = (1, 17, 50, 197, 257)
PROMPTS = (0, 1, 5, 10, 50, 100, 200)
HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = 1.4426950408889634


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


ALONE = [
    Case(1, 9, 64, queries=50, layout="kv"),
    Case(1, 49, 64, queries=197, layout="kv"),
    Case(1, 0, 32, queries=17, layout="kv", dtype=torch.float32),
    Case(1, 4, 72, queries=20, layout="kv", batch=67, dtype=torch.float16),
    Case(10, 0, 64, queries=50, layout="kv", shared=False),
]


@pytest.mark.parametrize("case", ALONE, ids=ids)
def test_more_queries_than_keys(case: Case, kernel_device: torch.device) -> None:
    """Attention to prompts alone: the first stands for the tokens, or those of each image do."""
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
