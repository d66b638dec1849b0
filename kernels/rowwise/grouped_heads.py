"""Linear classifiers of many tasks over one batch, in one launch.

The rows of all heads lie in one matrix. A program computes a tile of one image's logits: it reads
the image's features and the rows of its task's classes in place, and sums in fp32. Heads are
neither gathered nor padded. Inference only.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ..attention.checks import DTYPES
from ..runtime.allocate import empty
from ..runtime.launch import Launch, power_of_2_at_least, run

# CUDA's limit on the second axis of a grid, which counts tiles of classes.
_MAX_TILES = 65535
_BLOCK_C = 8
_NUM_WARPS = 4


# Offsets are read one at a time: their alignment makes no difference.
@triton.jit(do_not_specialize_on_alignment=("row_offsets_ptr", "counts_ptr", "logit_offsets_ptr"))
def grouped_heads_kernel(
    features_ptr,  # (B, WIDTH), contiguous
    weight_ptr,  # (rows, WIDTH), contiguous
    bias_ptr,  # (rows,)
    row_offsets_ptr,  # (B,) int64, into rows of weight and bias
    counts_ptr,  # (B,) int64
    logit_offsets_ptr,  # (B,) int64, into out
    out_ptr,  # (sum of counts,)
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    count = tl.load(counts_ptr + image)
    classes = first + tl.arange(0, BLOCK_C)
    exists = classes < count
    rows = tl.load(row_offsets_ptr + image) + classes
    features_ptr += image * WIDTH
    weight_rows = weight_ptr + rows[:, None] * WIDTH  # [BLOCK_C, 1]
    products = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    # The grid is as large as the largest head needs: programs past a head's last class skip.
    width = tl.where(first < count, WIDTH, 0)
    for start in range(0, width, BLOCK_F):
        dims = start + tl.arange(0, BLOCK_F)
        mask = exists[:, None] & (dims < WIDTH)[None, :]
        weight = tl.load(weight_rows + dims[None, :], mask=mask, other=0.0)
        # One pointer per weight, so that each lane loads the 16 bytes that it multiplies.
        pointers = tl.broadcast_to((features_ptr + dims)[None, :], mask.shape)
        features = tl.load(pointers, mask=mask, other=0.0)
        products += features.to(tl.float32) * weight.to(tl.float32)
    bias = tl.load(bias_ptr + rows, mask=exists, other=0.0)
    logits = tl.sum(products, 1) + bias.to(tl.float32)
    out_ptr += tl.load(logit_offsets_ptr + image)
    tl.store(out_ptr + classes, logits.to(out_ptr.dtype.element_ty), mask=exists)


def grouped_heads_launch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    logit_offsets: Tensor,
    out: Tensor,
    max_classes: int,
) -> Launch:
    """Return the launch that fills `out` (sum of the counts,); all tensors are contiguous.

    The other arguments are those of `grouped_heads_forward`.
    """
    batch, width = features.shape
    block = min(256, power_of_2_at_least(width))
    return Launch(
        name="grouped_heads",
        kernel=grouped_heads_kernel,
        grid=(batch, triton.cdiv(max_classes, _BLOCK_C), 1),
        arguments={
            "features_ptr": features, "weight_ptr": weight, "bias_ptr": bias,
            "row_offsets_ptr": row_offsets, "counts_ptr": counts,
            "logit_offsets_ptr": logit_offsets, "out_ptr": out,
        },
        constexprs={"WIDTH": width, "BLOCK_C": _BLOCK_C, "BLOCK_F": block},
        num_warps=_NUM_WARPS, num_stages=1,
        trips={"features": triton.cdiv(width, block)},
    )  # fmt: skip


def grouped_heads_forward(
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

    Args:
        features: Features (B, F); fp32, fp16 or bf16.
        weight, bias: Rows of all heads, (rows, F) and (rows,), in the dtype of the features.
        row_offsets, counts: First row and number of rows of each image's head, (B,) int64.
        logit_offsets: First logit of each image in the result, (B,) int64. The values of all three
            are not checked, since that would wait for the device.
        total: Sum of the counts.
        max_classes: Largest of the counts, or more; bounds the launch.

    Returns:
        Logits (total,) in the dtype of the features.

    Raises:
        TypeError: The dtype is not supported.
        ValueError: A head is too large for one launch.
    """
    if features.dtype not in DTYPES:
        raise TypeError(f"features are {features.dtype}; cast them to fp32, fp16 or bf16")
    if max_classes > _MAX_TILES * _BLOCK_C:
        raise ValueError(f"a head has {max_classes} classes; at most {_MAX_TILES * _BLOCK_C}")
    out = empty((total,), features.dtype, features.device)
    features, weight, bias = (t.contiguous() for t in (features, weight, bias))
    row_offsets, counts, logit_offsets = (
        t.contiguous() for t in (row_offsets, counts, logit_offsets)
    )
    launch = grouped_heads_launch(
        features, weight, bias, row_offsets, counts, logit_offsets, out, max_classes
    )
    run([launch], features.device)
    return out
