"""Classifiers of many tasks over one batch: the operator and its plain PyTorch path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_fast.ops.rowwise.grouped_heads import grouped_heads, grouped_heads_operator

HEADS = {
    "mixed": ([0, 4, 0, 9, 2], [4, 5, 4, 0, 3]),
    "one": ([3, 3, 3, 3, 3], [6, 6, 6, 6, 6]),
    "none": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
}


@dataclass
class Call:
    """Arguments of `grouped_heads`."""

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


def make(
    heads: str = "mixed", *, batch: int = 5, width: int = 6, dtype: torch.dtype = torch.float64
) -> Call:
    """Return random features and eleven rows of heads."""
    generator = torch.Generator().manual_seed(width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    row_offsets, counts = (
        torch.tensor(values[:batch], dtype=torch.int64) for values in HEADS[heads]
    )
    total, max_classes = int(counts.sum()), int(counts.max()) if batch else 0
    return Call(
        rand(batch, width), rand(11, width), rand(11), row_offsets, counts,
        counts.cumsum(0) - counts, total, max_classes,
    )  # fmt: skip


def image_by_image(call: Call) -> Tensor:
    """Compute one matrix-vector product per image, in fp64."""
    logits = [call.features.new_empty(0, dtype=torch.float64)]
    for features, start, count in zip(call.features, call.row_offsets, call.counts, strict=True):
        rows = slice(int(start), int(start + count))
        logits.append(call.weight[rows].double() @ features.double() + call.bias[rows].double())
    return torch.cat(logits)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sizes", [{}, {"batch": 1}, {"batch": 0}, {"width": 1}], ids=str)
def test_equals_a_product_for_each_image(heads: str, sizes: dict[str, int]) -> None:
    call = make(heads, **sizes)
    logits = grouped_heads(*call.arguments())
    torch.testing.assert_close(logits, image_by_image(call), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_a_linear_layer(dtype: torch.dtype) -> None:
    call = make(width=100, dtype=dtype)
    logits = grouped_heads(*call.arguments())
    assert logits.dtype == dtype
    exact = image_by_image(call)
    error = (logits.double() - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)


def test_offsets_may_come_in_any_order() -> None:
    """Logits are written at their offsets, whatever the order of the images."""
    call = make("one")
    call.logit_offsets = call.logit_offsets.flip(0)
    logits = grouped_heads(*call.arguments()).view(5, 6)
    torch.testing.assert_close(logits.flip(0).flatten(), image_by_image(call), rtol=1e-13, atol=0)


def test_one_product_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    linear = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    grouped_heads(*make().arguments())
    assert shapes == [((2, 6), (4, 6)), ((1, 6), (5, 6)), ((1, 6), (3, 6))]


@pytest.mark.parametrize("heads", HEADS)
def test_opcheck(heads: str) -> None:
    torch.library.opcheck(grouped_heads_operator, make(heads, dtype=torch.float32).arguments())


def test_has_no_backward() -> None:
    call = make()
    call.features.requires_grad_()
    with pytest.raises(RuntimeError, match="autograd"):
        grouped_heads(*call.arguments()).sum().backward()


def test_autocast() -> None:
    call = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_heads(*call.arguments()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"row_offsets": torch.tensor([8, 4, 0, 9, 2])}, ValueError, "8 to 12 of weight"),
        ({"row_offsets": torch.tensor([-1, 4, 0, 9, 2])}, ValueError, "-1 to 3 of weight"),
        ({"max_classes": 4}, ValueError, "5 classes; 0 to max_classes = 4"),
        ({"total": 15}, ValueError, "logits 13 to 16 of total = 15"),
        ({"total": 17}, ValueError, "sum to 16 where total is 17"),
        ({"logit_offsets": torch.tensor([-1, 4, 9, 13, 13])}, ValueError, "logits -1 to 3"),
        ({"total": -1}, ValueError, "must be 0 or more"),
        ({"features": torch.zeros(5, 7).double()}, ValueError, r"\(5, 7\) and \(11, 6\)"),
        ({"bias": torch.zeros(10).double()}, ValueError, r"bias is \(10,\)"),
        ({"bias": torch.zeros(11)}, TypeError, "one dtype"),
        ({"counts": torch.zeros(5, dtype=torch.int32)}, TypeError, r"counts is torch\.int32"),
        (
            {"logit_offsets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"logit_offsets must be \(5,\), not \(4,\)",
        ),
        ({"bias": torch.zeros(11, device="meta").double()}, ValueError, "one device"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = Call(**{**vars(make()), **changes})
    with pytest.raises(error, match=message):
        grouped_heads(*call.arguments())
