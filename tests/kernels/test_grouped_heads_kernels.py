"""The kernel of many tasks' classifiers against a product for each image, in fp64.

Rows of the matrix that belong to no image of the batch are NaN: reading one shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_fast.kernels.rowwise import grouped_heads as kernels
from vpt_fast.ops import operation
from vpt_fast.ops.rowwise import grouped_heads as operator

pytest_plugins = ("support.kernels.kernel_device",)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# One head twice, no classes, more than a tile of classes, the last rows.
HEADS = ((3, 5), (30, 0), (3, 5), (10, 21), (39, 1))


@dataclass
class Problem:
    """Arguments of the kernel."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    row_offsets: Tensor
    counts: Tensor
    logit_offsets: Tensor
    total: int
    max_classes: int

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def make_problem(
    heads: tuple[tuple[int, int], ...], width: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    generator = torch.Generator().manual_seed(width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = 40
    features, weight, bias = rand(len(heads), width), rand(rows, width), rand(rows)
    read = torch.zeros(rows, dtype=torch.bool)
    for start, count in heads:
        read[start : start + count] = True
    weight[~read] = bias[~read] = float("nan")
    row_offsets, counts = (torch.tensor(column) for column in zip(*heads, strict=True))
    logit_offsets = counts.cumsum(0) - counts
    tensors = (t.to(device) for t in (features, weight, bias, row_offsets, counts, logit_offsets))
    return Problem(*tensors, int(counts.sum()), int(counts.max()))


def image_by_image(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return logits in fp64, and the sum of the magnitudes of each one's products."""
    logits, sizes = [], []
    for x, start, count in zip(problem.features, problem.row_offsets, problem.counts, strict=True):
        rows = slice(int(start), int(start + count))
        weight, bias = problem.weight[rows].double(), problem.bias[rows].double()
        logits.append(weight @ x.double() + bias)
        sizes.append(weight.abs() @ x.double().abs() + bias.abs())
    return torch.cat(logits), torch.cat(sizes)


def assert_exact(problem: Problem, dtype: torch.dtype) -> None:
    """Assert that logits are summed in fp32 and rounded once."""
    logits = kernels.grouped_heads_forward(*problem.arguments())
    assert logits.dtype == dtype and logits.shape == (problem.total,)
    exact, sizes = image_by_image(problem)
    rounding = 0.5 * torch.finfo(dtype).eps * exact.abs() if dtype != FP32 else 0.0
    summing = 8 * torch.finfo(FP32).eps * sizes
    assert ((logits.double() - exact).abs() <= rounding + summing).all()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 72, 256, 300, 768])
def test_widths(width: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    assert_exact(make_problem(HEADS, width, dtype, kernel_device), dtype)


@pytest.mark.parametrize(
    "heads", [((0, 40),), ((39, 1),), ((0, 8), (8, 8)), ((0, 0), (5, 0))], ids=str
)
def test_heads(heads: tuple[tuple[int, int], ...], kernel_device: torch.device) -> None:
    assert_exact(make_problem(heads, 48, BF16, kernel_device), BF16)


def test_most_only_bounds_the_launch(kernel_device: torch.device) -> None:
    problem = make_problem(HEADS, 72, BF16, kernel_device)
    more = replace(problem, max_classes=100)
    have, want = (kernels.grouped_heads_forward(*p.arguments()) for p in (more, problem))
    assert torch.equal(have, want)


def test_an_image_does_not_depend_on_its_batch(kernel_device: torch.device) -> None:
    problem = make_problem(HEADS, 72, BF16, kernel_device)
    logits = kernels.grouped_heads_forward(*problem.arguments())
    one = slice(3, 4)
    alone = Problem(
        problem.features[one], problem.weight, problem.bias, problem.row_offsets[one],
        problem.counts[one], problem.logit_offsets[:1], 21, 21,
    )  # fmt: skip
    assert torch.equal(kernels.grouped_heads_forward(*alone.arguments()), logits[10:31])


def test_strides(kernel_device: torch.device) -> None:
    """One row of a larger tensor for each image, such as the class token."""
    problem = make_problem(HEADS, 72, BF16, kernel_device)
    want = kernels.grouped_heads_forward(*problem.arguments())
    tokens = torch.stack([problem.features] * 3, 1)
    have = kernels.grouped_heads_forward(*replace(problem, features=tokens[:, 1]).arguments())
    assert torch.equal(have, want)


def test_no_images(kernel_device: torch.device) -> None:
    problem = make_problem(HEADS, 8, BF16, kernel_device)
    none = Problem(
        problem.features[:0], problem.weight, problem.bias, problem.row_offsets[:0],
        problem.counts[:0], problem.logit_offsets[:0], 0, 0,
    )  # fmt: skip
    assert kernels.grouped_heads_forward(*none.arguments()).shape == (0,)


def test_the_operator_takes_the_kernel(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are on the CPU under ttsem, so the device check is patched."""
    monkeypatch.setattr(operation, "uses_kernels", lambda *_: True)
    problem = make_problem(HEADS, 72, BF16, kernel_device)
    have = operator.grouped_heads(*problem.arguments())
    assert torch.equal(have, kernels.grouped_heads_forward(*problem.arguments()))


def test_bad_inputs_are_named() -> None:
    problem = make_problem(HEADS, 8, BF16, torch.device("cpu"))
    double = replace(problem, features=problem.features.double())
    with pytest.raises(TypeError, match="float64; cast them"):
        kernels.grouped_heads_forward(*double.arguments())
    with pytest.raises(ValueError, match="a head has 524281 classes; at most 524280"):
        kernels.grouped_heads_forward(*replace(problem, max_classes=524281).arguments())
