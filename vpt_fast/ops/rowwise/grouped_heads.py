"""Linear classifiers of many tasks over one batch: every image goes through its own task's head.

The rows of all heads lie in one matrix, and every image has a row offset and a count. CUDA tensors
go to the Triton kernel of `vpt_fast.kernels.rowwise.grouped_heads`; elsewhere there is one product
per task. Inference only: there is no backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.backend import autocasts, computing_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::grouped_heads")
def grouped_heads_operator(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    logit_offsets: Tensor,
    total: int,
    max_classes: int,
) -> Tensor:
    """Return the result of `grouped_heads` for tensors that have been checked."""
    arguments = (features, weight, bias, row_offsets, counts, logit_offsets, total, max_classes)
    return GROUPED_HEADS.on(features)(*arguments)


@grouped_heads_operator.register_fake
def _(features: Tensor, *arguments: Any) -> Tensor:
    return features.new_empty(arguments[-2])


def grouped_heads(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    logit_offsets: Tensor,
    total: int,
    max_classes: int,
) -> Tensor:
    """Return the logits of every image under the head of its own task, packed image after image.

    Image b's head is rows `row_offsets[b]` to `row_offsets[b] + counts[b]` of `weight` and `bias`;
    its logits are written from `logit_offsets[b]` on. For inference: the logits cannot be
    differentiated.

    Args:
        features: Pooled features of each image, (B, F).
        weight: Rows of all heads, (rows, F).
        bias: Biases of the rows, (rows,); zeros for a head without bias.
        row_offsets: First row of each image's head, (B,) int64, on the device of `features`.
        counts: Classes of each image's task, (B,) int64; may be 0.
        logit_offsets: Sums of the counts before each image, (B,) int64.
        total: Sum of `counts`.
        max_classes: Largest of `counts`, or more. On CUDA it bounds the launch, and no values are
            read on the host.

    Returns:
        Logits (total,) in the dtype of `features`.

    Raises:
        ValueError: Shapes do not fit each other; on the CPU also a head outside of `weight`, and
            logits outside of the output or of which not all are written.
        TypeError: Dtypes differ, or row_offsets, counts or logit_offsets are not int64.
    """
    if autocasts(features):
        dtype = computing_dtype(features)
        features, weight, bias = (t.to(dtype) for t in (features, weight, bias))
    arguments = (features, weight, bias, row_offsets, counts, logit_offsets, total, max_classes)
    _check(*arguments)
    return grouped_heads_operator(*arguments)


def grouped_heads_reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    logit_offsets: Tensor,
    total: int,
    max_classes: int,
) -> Tensor:
    """Compute `grouped_heads` in plain PyTorch, one product per task."""
    heads: dict[tuple[int, int], list[int]] = {}
    images = zip(row_offsets.tolist(), counts.tolist(), logit_offsets.tolist(), strict=True)
    written = 0
    for image, (start, count, offset) in enumerate(images):
        if not 0 <= count <= max_classes:
            raise ValueError(
                f"image {image} has {count} classes; 0 to max_classes = {max_classes} are expected"
            )
        if start < 0 or start + count > weight.shape[0]:
            raise ValueError(
                f"rows {start} to {start + count} of weight are asked for; it has {len(weight)}"
            )
        if offset < 0 or offset + count > total:
            raise ValueError(
                f"image {image} writes logits {offset} to {offset + count} of total = {total}"
            )
        written += count
        if count:
            heads.setdefault((start, count), []).append(image)
    if written != total:
        raise ValueError(f"the counts sum to {written} where total is {total}")
    logits = features.new_empty(total)
    for (start, count), same in heads.items():
        index = torch.tensor(same, device=features.device)
        rows = slice(start, start + count)
        own = torch.nn.functional.linear(features[index], weight[rows], bias[rows])
        classes = torch.arange(count, device=features.device)
        logits[logit_offsets[index].unsqueeze(1) + classes] = own
    return logits


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    logit_offsets: Tensor,
    total: int,
    max_classes: int,
) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features (B, F) and weight (rows, F) expected, got {tuple(features.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)} where ({weight.shape[0]},) is expected")
    if not features.dtype == weight.dtype == bias.dtype:
        raise TypeError(
            f"features, weight and bias must have one dtype, got {features.dtype}, {weight.dtype} "
            f"and {bias.dtype}"
        )
    batch = features.shape[0]
    integers = {"row_offsets": row_offsets, "counts": counts, "logit_offsets": logit_offsets}
    for name, tensor in integers.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; cast it to int64")
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} must be ({batch},), not {tuple(tensor.shape)}")
    devices = {str(t.device) for t in (features, weight, bias, *integers.values())}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")
    if total < 0 or max_classes < 0:
        raise ValueError(f"total and max_classes must be 0 or more, not {total} and {max_classes}")


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise.grouped_heads import grouped_heads_forward

    return {"grouped_heads": grouped_heads_forward}


GROUPED_HEADS = Operation(
    "grouped_heads", _kernels, grouped_heads_reference, grouped_heads_operator
)
