"""Linear classifiers of many tasks over one batch, in one launch.

The rows of all heads lie in one matrix. A program computes a tile of one image's logits: it reads
the image's features and the rows of its task's classes where they lie, and sums in fp32. Nothing is
gathered, and no head is padded to the largest. Inference only.
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


# Places are read one at a time: wherever they lie, the code is the same.
@triton.jit(do_not_specialize_on_alignment=("starts_ptr", "counts_ptr", "offsets_ptr"))
def grouped_heads_kernel(
    features_ptr,  # (B, WIDTH), contiguous
    weight_ptr,  # (rows, WIDTH), contiguous
    bias_ptr,  # (rows,)
    starts_ptr,  # (B,) int64: rows of weight and bias
    counts_ptr,  # (B,) int64
    offsets_ptr,  # (B,) int64: places of the output
    out_ptr,  # (sum of counts,)
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    count = tl.load(counts_ptr + image)
    classes = first + tl.arange(0, BLOCK_C)
    exists = classes < count
    rows = tl.load(starts_ptr + image) + classes
    features_ptr += image * WIDTH
    weight_rows = weight_ptr + rows[:, None] * WIDTH  # [BLOCK_C, 1]
    products = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    # The grid is that of the largest head: a program without classes reads nothing.
    width = tl.where(first < count, WIDTH, 0)
    for start in range(0, width, BLOCK_F):
        dims = start + tl.arange(0, BLOCK_F)
        mask = exists[:, None] & (dims < WIDTH)[None, :]
        weight = tl.load(weight_rows + dims[None, :], mask=mask, other=0.0)
        # As many pointers as weights, so that each lane loads the 16 bytes that it multiplies.
        pointers = tl.broadcast_to((features_ptr + dims)[None, :], mask.shape)
        features = tl.load(pointers, mask=mask, other=0.0)
        products += features.to(tl.float32) * weight.to(tl.float32)
    bias = tl.load(bias_ptr + rows, mask=exists, other=0.0)
    logits = tl.sum(products, 1) + bias.to(tl.float32)
    out_ptr += tl.load(offsets_ptr + image)
    tl.store(out_ptr + classes, logits.to(out_ptr.dtype.element_ty), mask=exists)


def grouped_heads_launch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    counts: Tensor,
    offsets: Tensor,
    out: Tensor,
    most: int,
) -> Launch:
    """The launch that fills `out` (the sum of the counts,); all tensors are contiguous.

    Args:
        features, weight, bias, starts, counts, offsets, most: as of `grouped_heads_forward`.
    """
    batch, width = features.shape
    block = min(256, power_of_2_at_least(width))
    return Launch(
        name="grouped_heads",
        kernel=grouped_heads_kernel,
        grid=(batch, triton.cdiv(most, _BLOCK_C), 1),
        arguments={
            "features_ptr": features,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "starts_ptr": starts,
            "counts_ptr": counts,
            "offsets_ptr": offsets,
            "out_ptr": out,
        },
        constexprs={"WIDTH": width, "BLOCK_C": _BLOCK_C, "BLOCK_F": block},
        num_warps=_NUM_WARPS,
        num_stages=1,
        trips={"features": triton.cdiv(width, block)},
    )


def grouped_heads_forward(
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

    Args:
        features: (B, F); fp32, fp16 or bf16.
        weight, bias: rows of all heads, (rows, F) and (rows,), in the dtype of the features.
        starts, counts: (B,) int64: image b's head is rows starts[b] to starts[b] + counts[b].
        offsets: (B,) int64: where its logits are written. The values of all three are not checked:
            that would wait for the device.
        total: the sum of the counts.
        most: the largest of the counts, or more; bounds the launch.

    Returns:
        (total,) in the dtype of the features.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: heads too large for a launch.
    """
    if features.dtype not in DTYPES:
        raise TypeError(f"features are {features.dtype}; cast them to fp32, fp16 or bf16")
    if most > _MAX_TILES * _BLOCK_C:
        raise ValueError(f"a head has {most} classes; at most {_MAX_TILES * _BLOCK_C}")
    out = empty((total,), features.dtype, features.device)
    features, weight, bias = (t.contiguous() for t in (features, weight, bias))
    starts, counts, offsets = (t.contiguous() for t in (starts, counts, offsets))
    launch = grouped_heads_launch(features, weight, bias, starts, counts, offsets, out, most)
    run([launch], features.device)
    return out
