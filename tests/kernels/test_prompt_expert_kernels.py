"""The prompt experts' kernels against the plain formulation in fp64, and eager PyTorch's own error.

A kernel may be as far from fp64 as one rounding of its result; what stays in fp32 has to be much
closer. Without a GPU every launch runs under ttsem, which finds accesses out of bounds and races;
outputs are poisoned with NaN.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.kernels.prompt_expert_checks import (
    CHECKS,
    EPS,
    Case,
    Draw,
    distance,
    folded,
    norm_and_mix,
    rounding,
    wide,
)
from torch import Tensor

from vpt_fast.kernels.experts import launches as kernels
from vpt_fast.ops.experts import reference

pytest_plugins = ("support.kernels.kernel_device",)


QUICK = (
    Case(),
    Case(prompts=1, dtype=torch.float32, prefix=0, batch=1, grid=(4, 5), size=1),
    Case(prompts=5, width=384, grid=(5, 3), size=3, dtype=torch.float16, prefix=5),
    Case(prompts=50, width=96, grid=(7, 7), offset=8.0, options=False),
    Case(prompts=100, width=64, grid=(3, 9), size=3, batch=3),
    Case(prompts=10, width=768, grid=(2, 2), size=2, batch=1, prefix=2),
    Case(prompts=20, width=80, grid=(6, 6), dtype=torch.float32, options=False),
    Case(prompts=3, width=1280, grid=(2, 3), size=1, batch=1),
    Case(prompts=200, width=48, grid=(3, 3), prefix=0, batch=1),
)
FULL = tuple(
    Case(prompts, width, grid, 1 + index % 3, dtype, batch=1 + (grid == (4, 4)))
    for index, (prompts, width, (grid, dtype)) in enumerate(
        itertools.product(
            (1, 5, 10, 50, 100),
            (192, 384, 768, 1024, 1280),
            (
                ((4, 4), torch.bfloat16),
                ((4, 4), torch.float16),
                ((4, 4), torch.float32),
                ((14, 14), torch.bfloat16),
            ),
        )
    )
    # More accesses than are stored to look for races: `test_the_largest_grids` has it.
    if (prompts, width, grid) != (100, 1280, (14, 14))
)
LARGE = tuple(
    Case(prompts, width, (37, 37), size, batch=1)
    for prompts, width, size in ((1, 384, 1), (10, 768, 2), (50, 1024, 2), (100, 192, 3))
)


def _is_quick(case: Case, part: str) -> bool:
    """Return whether a check is run by default; many prompts take long to fold at once."""
    return case in QUICK and not (part == "folds" and case.prompts > 50)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        pytest.param(
            *(case, part),
            marks=() if _is_quick(case, part) else pytest.mark.full,
            id=f"{case}-{part}",
        )
        for case, part in itertools.product((*QUICK, *FULL), CHECKS)
    ],
)
def test_kernels_are_within_a_rounding_of_fp64(
    case: Case, part: str, kernel_device: torch.device
) -> None:
    CHECKS[part](case, kernel_device)


@pytest.mark.full
@pytest.mark.parametrize("part", CHECKS)
@pytest.mark.parametrize("case", [*LARGE, Case(100, 1280, (14, 14), 1, batch=1)], ids=str)
def test_the_largest_grids(case: Case, part: str, kernel_device_large: torch.device) -> None:
    CHECKS[part](case, kernel_device_large)


@pytest.mark.parametrize("part", CHECKS)
def test_the_code_for_sm_80_gives_the_same(part: str, kernel_device_sm80: torch.device) -> None:
    CHECKS[part](Case(width=96, grid=(5, 4)), kernel_device_sm80)


@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_the_mix_is_far_closer_to_fp64_than_eager_bf16(
    offset: float, kernel_device: torch.device
) -> None:
    case = Case(width=256, grid=(6, 6), offset=offset)
    draw = Draw(case, kernel_device)
    x = draw(case.batch, 1 + case.patches, case.width) + offset
    mixing_weight = folded(case, draw)
    _, found, _ = norm_and_mix(x, mixing_weight, case.patches, None, None)
    y = F.layer_norm(x.double().cpu(), (case.width,), eps=EPS)[:, 1:]
    right = mixing_weight[:, : case.patches].double().cpu() @ y
    rows = F.layer_norm(x.cpu(), (case.width,), eps=EPS)[:, 1:]
    eager = mixing_weight[:, : case.patches].cpu().bfloat16() @ rows

    def relative(value: Tensor) -> float:
        return float((value.double().cpu() - right).norm() / right.norm())

    assert relative(found) < 2e-5
    assert relative(found) < relative(eager) / 50


def test_a_neighbouring_image_of_nan_and_infinity_changes_nothing(
    kernel_device: torch.device,
) -> None:
    case = Case(width=96, grid=(3, 3), batch=3)
    draw = Draw(case, kernel_device)
    x = draw(3, 10, 96)
    mixing_weight, weight = folded(case, draw), draw(96)
    grads = draw(3, 10, 96), draw(3, 10, 96, dtype=torch.float32), draw(3, 10, 96)

    def run() -> list[Tensor]:
        y, mixing, statistics = norm_and_mix(x, mixing_weight, 9, weight, None)
        grad_x = kernels.mix_backward(x, mixing_weight, 9, weight, statistics, *grads, True, False)
        return [t[1].clone() for t in (y, mixing, *grad_x)]

    before = run()
    x[0], x[2] = float("nan"), float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


def test_the_same_inputs_give_the_same_bits(kernel_device: torch.device) -> None:
    case = Case(width=64, batch=34, grid=(2, 2), prompts=2)
    draw = Draw(case, kernel_device)
    x, mixing_weight = draw(34, 5, 64), folded(case, draw)
    grads = draw(34, 5, 64), draw(34, 2, 64, dtype=torch.float32), None
    statistics = norm_and_mix(x, mixing_weight, 4, None, None)[2]
    results = [
        kernels.mix_backward(x, mixing_weight, 4, None, statistics, *grads, True, True)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    right = reference.mix_backward(
        *wide(x, mixing_weight), 4, None, *wide(statistics, *grads), True, True
    )
    assert distance(results[0][1], right[1]) < rounding(case.dtype)


def test_an_empty_batch_gives_empty_results_and_zero_gradients(
    kernel_device: torch.device,
) -> None:
    case = Case(width=64, batch=0, grid=(2, 2), prompts=2)
    draw = Draw(case, kernel_device)
    x, mixing_weight, weight = draw(0, 5, 64), folded(case, draw), draw(64)
    _, mixing, statistics = norm_and_mix(x, mixing_weight, 4, weight, None)
    grads = x, mixing, None
    grad_x, grad_mixing_weight = kernels.mix_backward(
        x, mixing_weight, 4, weight, statistics, *grads, True, True
    )
    assert mixing.shape == (0, 2, 64) and grad_x.shape == x.shape
    assert grad_mixing_weight.shape == (2, 4) and not grad_mixing_weight.any()


def test_fp64_is_refused(kernel_device: torch.device) -> None:
    x = torch.zeros(1, 5, 16, dtype=torch.float64, device=kernel_device)
    mixing_weight = torch.zeros(1, 64, device=kernel_device)
    with pytest.raises(TypeError, match="float64"):
        kernels.mix_forward(x, mixing_weight, 4, torch.zeros(3, 1, 5, device=kernel_device))
