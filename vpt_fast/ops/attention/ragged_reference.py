"""Attention in which every image has prompts of its own task, in plain PyTorch.

`bank_attention` of `ragged` has the definition and the layouts. Images with equally many prompts
are computed together, by one call of PyTorch's fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.ops.attention.reference import attend
from vpt_fast.ops.backend import statistics_dtype

_ONE_REGION = 32767
"""Most elements of a slice for which index_select starts its threads once: with larger slices
PyTorch starts and awaits all of them for every slice."""

Pools = tuple[Tensor, Tensor]
"""Cached prompts, and those computed for this batch."""


def bank_attention_forward(
    tokens: list[Tensor],
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output (B, M, H * d) and the base-2 log-sum-exp (B, H, M) of the scaled scores.

    Raises:
        ValueError: Prompts lie outside of their pool, or an image has more than `max_prompts`.
    """
    q, pools = split(tokens)[0], (cached, computed)
    offsets = row_offsets.tolist()
    groups: dict[int, list[int]] = {}
    for image, (offset, count) in enumerate(zip(offsets, counts.tolist(), strict=True)):
        _check(pools, offset, count, max_prompts)
        groups.setdefault(count, []).append(image)
    if len(groups) <= 1:
        k, v = _joined_kv(tokens, pools, offsets, next(iter(groups), 0), None)
        return attend(q.transpose(1, 2), k, v, scale)
    batch, rows, heads, dim = q.shape
    out = q.new_empty(batch, rows, heads * dim)
    lse = q.new_empty(batch, heads, rows, dtype=statistics_dtype(q.dtype))
    for count, images in groups.items():
        index = torch.tensor(images, device=q.device)
        k, v = _joined_kv(tokens, pools, [offsets[image] for image in images], count, index)
        found = attend(q.index_select(0, index).transpose(1, 2), k, v, scale)
        out.index_copy_(0, index, found[0])
        lse.index_copy_(0, index, found[1])
    return out, lse


def _check(pools: Pools, offset: int, count: int, max_prompts: int) -> None:
    name, pool, first = (
        ("computed", pools[1], ~offset) if offset < 0 else ("cached", pools[0], offset)
    )
    if not 0 <= count <= max_prompts:
        raise ValueError(
            f"an image has {count} prompts; 0 to max_prompts = {max_prompts} are expected"
        )
    if count and first + count > pool.shape[0]:
        raise ValueError(
            f"rows {first} to {first + count} of `{name}` are asked for; it has {pool.shape[0]}"
        )


def _joined_kv(
    tokens: list[Tensor], pools: Pools, offsets: Sequence[int], count: int, images: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return k and v (images, H, p + N, d) of images that have p = `count` prompts each.

    Args:
        tokens, pools: Tokens of the whole batch, and both pools.
        offsets: Row offset of each image.
        count: Prompts of each image.
        images: Batch indices of the images; None for the whole batch.
    """
    _, k, v = split(tokens)
    if count == 0:
        k, v = (t if images is None else t.index_select(0, images) for t in (k, v))
        return k.transpose(1, 2), v.transpose(1, 2)
    k, v = (
        _join(t, [pool[:, part] for pool in pools], offsets, count, images)
        for part, t in enumerate((k, v))
    )
    return k, v


def _join(
    tokens: Tensor,
    pools: Sequence[Tensor],
    offsets: Sequence[int],
    count: int,
    images: Tensor | None,
) -> Tensor:
    """Return a view (images, H, p + N, d) of k or of v, prompts before tokens."""
    rows, *channels = tokens.shape[1:]
    joined = tokens.new_empty(len(offsets), count + rows, *channels)
    if images is None:
        joined[:, count:].copy_(tokens)
    else:
        torch.index_select(tokens, 0, images, out=joined[:, count:])
    _gather(pools, offsets, joined[:, :count])
    return joined.transpose(1, 2)


def _gather(pools: Sequence[Tensor], offsets: Sequence[int], out: Tensor) -> None:
    """Copy the prompts of each image from two pools (rows, H, d) to `out` (images, p, H, d)."""
    device = out.device
    for pool, is_computed in zip(pools, (False, True), strict=True):
        images = [image for image, offset in enumerate(offsets) if (offset < 0) == is_computed]
        if not images:
            continue
        rows = [~offsets[i] if is_computed else offsets[i] for i in images]
        first = torch.tensor(rows, device=device)
        if len(images) == len(offsets):
            _copy_runs(pool, first, out)
        else:
            found = out.new_empty(len(images), *out.shape[1:])
            _copy_runs(pool, first, found)
            out.index_copy_(0, torch.tensor(images, device=device), found)


def _copy_runs(pool: Tensor, first: Tensor, out: Tensor) -> None:
    """Copy p rows of a pool (rows, H, d), from row `first[i]` on, to `out[i]` (p, H, d)."""
    count, row = out.shape[1], out.shape[2:]
    step = max(1, _ONE_REGION // row.numel())
    for at in range(0, count, step):
        size = min(step, count - at)
        # Entry r of `runs` is rows r to r + size: entries overlap.
        runs = pool[at:].unfold(0, size, 1).movedim(-1, 1)
        torch.index_select(runs, 0, first, out=out[:, at : at + size])
