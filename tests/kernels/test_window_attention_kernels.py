"""The kernels of windowed attention against roll, pad, cut, softmax and back by hand, in fp64.

A kernel may be no further from fp64 than plain PyTorch in the same dtype, plus about one rounding
of the result.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernels.on_device import differs_by_one_rounding
from support.kernels.window_attention_problem import (
    LOG2_E,
    Case,
    assert_as_exact_as_eager,
    kernels,
    make_problem,
)

from vpt_fast.kernels.window_attention.launches import (
    window_attention_backward,
    window_attention_forward,
)

pytest_plugins = ("support.kernels.kernel_device",)

DTYPES = FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ids = str


COVERING = [
    Case((14, 14), (7, 7)),
    Case((14, 14), (7, 7), (3, 3), prompts=10, heads=3, batch=1),
    Case((10, 16), (7, 7), (3, 3), prompts=50, dtype=FP16),
    Case((10, 16), (7, 7), (3, 3), prompts=50, pad=False, shared=False),
    Case((9, 13), (7, 7), (3, 0), prompts=1, head_dim=24, heads=2, batch=1),
    Case((9, 8), (5, 3), (2, 1), prompts=0, head_dim=16, heads=2, batch=1),
    Case((5, 9), (4, 8), (0, 4), prompts=None, head_dim=48, dtype=FP16),
    Case((3, 5), (7, 7), (3, 3), head_dim=64, batch=1, shared=False),
    Case((8, 8), (8, 8), prompts=3, head_dim=40, shared=False),
    Case((8, 9), (4, 4), (2, 2), prompts=7, dtype=FP32),
    Case((8, 7), (7, 7), (3, 3), prompts=5, dtype=FP32, head_dim=33, shared=False),
    Case((12, 12), (12, 12), prompts=10, heads=2, batch=1),
    pytest.param(Case((13, 24), (12, 12), (6, 6), prompts=50, batch=1), marks=pytest.mark.full),
    Case((13, 12), (12, 12), (6, 6), prompts=1, dtype=FP16, pad=False, shared=False),
    pytest.param(Case((16, 15), (16, 16), prompts=5, batch=1), marks=pytest.mark.full),
    Case((7, 7), (7, 7), prompts=200),
    Case((7, 9), (7, 7), (3, 3), prompts=5, head_dim=128),
    Case((6, 20), (6, 20), (0, 0), prompts=0, head_dim=72, dtype=FP16),
]


@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_as_exact_as_eager(case: Case, kernel_device: torch.device) -> None:
    assert_as_exact_as_eager(case, kernel_device)


GRID = [
    Case(*geometry, prompts=prompts, head_dim=dim, dtype=dtype, pad=pad, shared=shared)
    for geometry, prompts, dim, dtype, (pad, shared) in itertools.product(
        [
            ((14, 14), (7, 7), (0, 0)),
            ((14, 14), (7, 7), (3, 3)),
            ((10, 16), (7, 7), (3, 3)),
            ((5, 7), (7, 7), (3, 3)),
            ((12, 12), (12, 12), (0, 0)),
            ((13, 14), (12, 12), (6, 6)),
            ((9, 10), (4, 6), (2, 3)),
            ((11, 9), (2, 3), (1, 0)),
            ((16, 16), (16, 16), (0, 0)),
        ],
        (0, 1, 10, 50, 200),
        (16, 32, 48, 64, 128),
        DTYPES,
        [(True, True), (False, False)],
    )
    if prompts or shared
]


@pytest.mark.full
@pytest.mark.parametrize("case", GRID, ids=ids)
def test_as_exact_as_eager_grid(case: Case, kernel_device_large: torch.device) -> None:
    assert_as_exact_as_eager(case, kernel_device_large)


@pytest.mark.parametrize(
    "case",
    [
        Case((10, 16), (7, 7), (3, 3), prompts=10),
        Case((10, 8), (7, 7), (3, 3), prompts=50, shared=False),
        Case((13, 12), (12, 12), (6, 6), prompts=10),
    ],
    ids=ids,
)
def test_sm80(case: Case, kernel_device_sm80: torch.device) -> None:
    """The launches that an A100 would run."""
    assert_as_exact_as_eager(case, kernel_device_sm80)


@pytest.mark.parametrize(
    "case",
    [
        Case((4, 4), (2, 2), (1, 1), prompts=3, head_dim=16, batch=41),
        Case((14, 7), (7, 7), (3, 3), prompts=20, head_dim=16, batch=5),
        Case((8, 6), (4, 3), (2, 1), prompts=70, head_dim=16, batch=7),
    ],
    ids=ids,
)
def test_sums_over_many_windows(case: Case, kernel_device: torch.device) -> None:
    """Sums of several windows each; the last sum of every kind of window has fewer."""
    assert_as_exact_as_eager(case, kernel_device)


BOTH_KERNELS = [
    Case((10, 8), (7, 7), (3, 3), batch=3),
    Case((10, 8), (7, 7), (3, 3), prompts=20, batch=3, shared=False),
    Case((9, 5), (5, 3), (2, 1), head_dim=40, batch=3, shared=False),
]
"""Whole windows and tiles, prompts beside the tokens and apart."""


@pytest.mark.parametrize("case", BOTH_KERNELS, ids=ids)
def test_only_what_is_needed(case: Case, kernel_device: torch.device) -> None:
    """Some gradients alone equal those computed together: bit for bit, except for sums.

    Where the terms of a sum over windows are not read otherwise, matrix instructions take the sum
    and round differently.
    """
    problem = make_problem(case, kernel_device)
    whole = kernels(problem, case)
    names = {
        "tokens": {"dq", "dk", "dv"},
        "prompts": {"prompt_dk", "prompt_dv"},
        "table": {"table"},
    }
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        asked = dict(zip(names, needs, strict=True))
        part = kernels(problem, case, **asked)
        expected = {"out", "lse"}.union(*(names[n] for n, needed in asked.items() if needed))
        assert set(part) == expected
        for name, values in part.items():
            summed = name in ("prompt_dk", "prompt_dv", "table")
            same = differs_by_one_rounding if summed else torch.equal
            assert same(values, whole[name]), (name, asked)


@pytest.mark.parametrize("case", BOTH_KERNELS, ids=ids)
def test_same_inputs_same_bits(case: Case, kernel_device: torch.device) -> None:
    first, second = (kernels(make_problem(case, kernel_device), case) for _ in range(2))
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize("case", BOTH_KERNELS, ids=ids)
def test_an_image_does_not_depend_on_its_batch(case: Case, kernel_device: torch.device) -> None:
    """Results and gradients of one image are the same bits in any batch."""
    problem = make_problem(case, kernel_device)
    own = {"qkv", "grad_out"} | (set() if case.shared else {"prompts"})
    alone = {n: t[1:2] if n in own else t for n, t in problem.items()}
    together = kernels(problem, case, table=False)
    single = kernels(alone, replace(case, batch=1), table=False)
    for name, values in single.items():
        if not (case.shared and name.startswith("prompt")):
            assert torch.equal(values, together[name][1:2]), name


@pytest.mark.parametrize("shared", [True, False])
def test_empty_batch(shared: bool, kernel_device: torch.device) -> None:
    """No images: empty results; gradients of shared tensors are 0."""
    case = Case((7, 7), (7, 7), batch=0, shared=shared)
    for name, values in kernels(make_problem(case, kernel_device), case).items():
        if name == "table" or (shared and name.startswith("prompt")):
            assert values.numel() and not values.any()
        else:
            assert values.numel() == 0


@pytest.mark.parametrize(
    ("offset", "case"), [*((1, c) for c in BOTH_KERNELS), (4, BOTH_KERNELS[0])], ids=ids
)
def test_unaligned_and_strided(offset: int, case: Case, kernel_device: torch.device) -> None:
    """Tensors whose rows are not aligned to 16 bytes, or that are not contiguous."""
    problem = make_problem(case, kernel_device)
    expected = kernels(problem, case)
    moved = {}
    for name, tensor in problem.items():
        memory = torch.zeros(tensor.numel() + offset, dtype=case.dtype, device=kernel_device)
        moved[name] = memory[offset:].view(tensor.shape).copy_(tensor)
    strided = dict(problem)
    for name in ("qkv", "prompts", "grad_out"):
        strided[name] = torch.stack([problem[name]] * 2, -1)[..., 0]
    for variant in (moved, strided) if offset == 1 else (moved,):
        for name, values in kernels(variant, case).items():
            assert differs_by_one_rounding(values, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_table_keeps_its_dtype(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """As a parameter does under autocast: an fp32 table beside 16-bit tokens is not rounded."""
    case = Case((7, 7), (7, 7), prompts=None, dtype=dtype, batch=1)
    problem = make_problem(case, kernel_device)
    problem["qkv"][:, :, :, 0] = 0.0
    problem["table"] = torch.full_like(problem["table"], 1.2345678, dtype=torch.float32)
    _, lse = window_attention_forward(
        problem["qkv"], problem["pad"], problem["table"], None, case.window, case.shift, 1.0
    )
    exact = torch.tensor(49.0).double().log2() + problem["table"][0, 0].double().cpu() * LOG2_E
    assert (lse.double().cpu() - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps


def test_extreme_scores_stay_finite(kernel_device: torch.device) -> None:
    """Scores far below and far above 0, whose exponentials alone would under- and overflow."""
    for case in (Case((7, 8), (7, 7), batch=1), Case((4, 5), (4, 4), (2, 2), dtype=FP32)):
        problem = make_problem(case, kernel_device)
        for size in (-200.0, 200.0):
            problem["qkv"][..., 0, :, 0], problem["qkv"][..., 1, :, 0] = size, abs(size)
            problem["prompts"][:, :, 0, :, 0] = abs(size)
            assert all(values.isfinite().all() for values in kernels(problem, case).values())


def bad_inputs() -> list[Any]:
    qkv, table = torch.zeros(2, 5, 5, 3, 2, 8), torch.zeros(9, 2)
    prompts = torch.zeros(1, 3, 2, 2, 8)
    good = {
        "qkv": qkv, "pad": None, "table": table, "prompts": prompts,
        "window": (2, 2), "shift": (1, 1), "scale": 0.5,
    }  # fmt: skip

    def bad(error: type[Exception], message: str, **changes: Any) -> Any:
        return pytest.param({**good, **changes}, error, message, id=message)

    return [
        bad(TypeError, "qkv is torch.float64", qkv=qkv.double()),
        bad(ValueError, "qkv must be", qkv=qkv[0]),
        bad(ValueError, "no tokens", qkv=qkv[:, :0]),
        bad(ValueError, "129 channels", qkv=torch.zeros(1, 2, 2, 3, 2, 129), prompts=None),
        bad(ValueError, "window is", window=(0, 2)),
        bad(ValueError, "shift is", shift=(2, 0)),
        bad(ValueError, "scale must be", scale=0.0),
        bad(ValueError, "table is", table=table[:8]),
        bad(TypeError, "table is torch.int64", table=table.long()),
        bad(ValueError, "pad is", pad=torch.zeros(3, 2, 7)),
        bad(TypeError, "pad is torch.float16", pad=torch.zeros(3, 2, 8).half()),
        bad(ValueError, "prompts must be", prompts=prompts[:, :, :1]),
        bad(ValueError, "prompts are of 3 images", prompts=prompts.expand(3, -1, -1, -1, -1)),
        bad(TypeError, "prompts is torch.float16", prompts=prompts.half()),
    ]


@pytest.mark.parametrize(("given", "error", "message"), bad_inputs())
def test_bad_inputs_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        window_attention_forward(**given)


def test_bad_saved_tensors_are_named() -> None:
    qkv, table = torch.zeros(2, 4, 4, 3, 2, 8), torch.zeros(9, 2)
    out, lse = torch.zeros(2, 4, 4, 16), torch.zeros(2, 2, 4, 4)
    for name, saved in (
        ("out", (out[:1], lse, out)),
        ("lse", (out, lse[:1], out)),
        ("lse", (out, lse.half(), out)),
        ("grad_out", (out, lse, out.half())),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name} is"):
            window_attention_backward(
                qkv, None, table, None, *saved, (2, 2), (0, 0), 0.5, True, False, False
            )
