"""Linear classifiers of many tasks over one batch: every image goes through its own task's head.

All heads' rows lie in one matrix, and an image says where its own start and how many there are.
CUDA tensors go to the Triton kernel of `vpt_fast.kernels.rowwise.grouped_heads`; elsewhere there is
one product per task. For inference: there is no backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::grouped_heads")
def grouped_heads_operator(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    total: int,
    most: int,
) -> Tensor:
    """`grouped_heads` of tensors that have been checked."""
    arguments = (features, weight, bias, starts, counts, offsets, total, most)
    return GROUPED_HEADS.on(features)(*arguments)


@grouped_heads_operator.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    total: int,
    most: int,
) -> Tensor:
    return features.new_empty(total)


def grouped_heads(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    total: int,
    most: int,
) -> Tensor:
    """Logits of every image under the head of its own task, packed image after image.

    Image b's head is rows `starts[b]` to `starts[b] + counts[b]` of `weight` and `bias`; its logits
    are written from `offsets[b]` on. For inference: the logits cannot be differentiated.

    Args:
        features: (B, F), what the model pools of each image.
        weight: the rows of all heads, (rows, F).
        bias: (rows,); zeros for a head without one.
        starts: (B,) int64, on the device of `features`.
        counts: (B,) int64, classes of each image's task; may be 0.
        offsets: (B,) int64, the sums of the counts before each image.
        total: the sum of `counts`.
        most: the largest of `counts`, or more. On CUDA it bounds the launch, and nothing is looked
            at on the host.

    Returns:
        (total,) in the dtype of `features`.

    Raises:
        ValueError: shapes do not fit each other; on the CPU also a head outside of `weight` and
            logits outside of the output or of which not all are written.
        TypeError: dtypes differ, or starts, counts or offsets are not int64.
    """
    if torch.is_autocast_enabled(features.device.type):
        dtype = computing_dtype(features)
        features, weight, bias = (t.to(dtype) for t in (features, weight, bias))
    _check(features, weight, bias, starts, counts, offsets, total, most)
    return grouped_heads_operator(features, weight, bias, starts, counts, offsets, total, most)


def grouped_heads_reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    total: int,
    most: int,
) -> Tensor:
    """`grouped_heads` in plain PyTorch, one product per task."""
    heads: dict[tuple[int, int], list[int]] = {}
    places = zip(starts.tolist(), counts.tolist(), offsets.tolist(), strict=True)
    written = 0
    for image, (start, count, offset) in enumerate(places):
        if not 0 <= count <= most:
            raise ValueError(f"image {image} has {count} classes; 0 to most = {most} are expected")
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
    for (start, count), images in heads.items():
        index = torch.tensor(images, device=features.device)
        rows = slice(start, start + count)
        own = torch.nn.functional.linear(features[index], weight[rows], bias[rows])
        classes = torch.arange(count, device=features.device)
        logits[offsets[index].unsqueeze(1) + classes] = own
    return logits


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    total: int,
    most: int,
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
    for name, places in (("starts", starts), ("counts", counts), ("offsets", offsets)):
        if places.dtype != torch.int64:
            raise TypeError(f"{name} is {places.dtype} where torch.int64 is expected")
        if tuple(places.shape) != (batch,):
            raise ValueError(f"{name} is {tuple(places.shape)} where ({batch},) is expected")
    devices = {str(t.device) for t in (features, weight, bias, starts, counts, offsets)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")
    if total < 0 or most < 0:
        raise ValueError(f"total and most must be 0 or more, not {total} and {most}")


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise.grouped_heads import grouped_heads_forward

    return {"grouped_heads": grouped_heads_forward}


GROUPED_HEADS = Operation(
    "grouped_heads", _kernels, grouped_heads_reference, grouped_heads_operator
)
