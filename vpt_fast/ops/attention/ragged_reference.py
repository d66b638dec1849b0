"""Attention in which every image has prompts of its own task, in plain PyTorch.

`bank_attention` of the module of that name says what is computed and in which layouts. Images with
equally many prompts are computed together, by one call of PyTorch's fused attention.
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


def bank_attention_forward(
    tokens: list[Tensor],
    rest: Tensor,
    made: Tensor,
    starts: Tensor,
    counts: Tensor,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, M, H * d) and the base-2 log-sum-exp (B, H, M) of the scaled scores.

    Raises:
        ValueError: prompts that lie outside of their pool, or an image with more than `most`.
    """
    q = split(tokens)[0]
    places = starts.tolist()
    groups: dict[int, list[int]] = {}
    for image, (start, count) in enumerate(zip(places, counts.tolist(), strict=True)):
        _check(rest, made, start, count, most)
        groups.setdefault(count, []).append(image)
    if len(groups) <= 1:
        keys, values = _keys_values(tokens, (rest, made), places, next(iter(groups), 0), None)
        return attend(q.transpose(1, 2), keys, values, scale)
    batch, rows, heads, dim = q.shape
    out = q.new_empty(batch, rows, heads * dim)
    lse = q.new_empty(batch, heads, rows, dtype=statistics_dtype(q.dtype))
    for count, images in groups.items():
        index = torch.tensor(images, device=q.device)
        theirs = [places[image] for image in images]
        keys, values = _keys_values(tokens, (rest, made), theirs, count, index)
        found = attend(q.index_select(0, index).transpose(1, 2), keys, values, scale)
        out.index_copy_(0, index, found[0])
        lse.index_copy_(0, index, found[1])
    return out, lse


def _check(rest: Tensor, made: Tensor, start: int, count: int, most: int) -> None:
    name, pool, first = ("made", made, ~start) if start < 0 else ("rest", rest, start)
    if not 0 <= count <= most:
        raise ValueError(f"an image has {count} prompts; 0 to most = {most} are expected")
    if count and first + count > pool.shape[0]:
        raise ValueError(
            f"rows {first} to {first + count} of `{name}` are asked for; it has {pool.shape[0]}"
        )


def _keys_values(
    tokens: list[Tensor],
    pools: tuple[Tensor, Tensor],
    places: Sequence[int],
    count: int,
    images: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """k and v (images, H, p + N, d) of images that have p = `count` prompts each, prompts first.

    Args:
        places: where their prompts start.
        images: their numbers; None for the whole batch.
    """
    _, k, v = split(tokens)
    if count == 0:
        k, v = (t if images is None else t.index_select(0, images) for t in (k, v))
        return k.transpose(1, 2), v.transpose(1, 2)
    keys, values = (
        _join(t, [pool[:, part] for pool in pools], places, count, images)
        for part, t in enumerate((k, v))
    )
    return keys, values


def _join(
    tokens: Tensor,
    pools: Sequence[Tensor],
    places: Sequence[int],
    count: int,
    images: Tensor | None,
) -> Tensor:
    """(images, H, p + N, d) view of the keys, or the values, of images, prompts first."""
    rows, *channels = tokens.shape[1:]
    joined = tokens.new_empty(len(places), count + rows, *channels)
    if images is None:
        joined[:, count:].copy_(tokens)
    else:
        torch.index_select(tokens, 0, images, out=joined[:, count:])
    _gather(pools, places, joined[:, :count])
    return joined.transpose(1, 2)


def _gather(pools: Sequence[Tensor], places: Sequence[int], out: Tensor) -> None:
    """Copy the prompts of each image from two pools (rows, H, d) to `out` (images, p, H, d)."""
    device = out.device
    for pool, is_made in zip(pools, (False, True), strict=True):
        theirs = [image for image, start in enumerate(places) if (start < 0) == is_made]
        if not theirs:
            continue
        first = torch.tensor([~places[i] if is_made else places[i] for i in theirs], device=device)
        if len(theirs) == len(places):
            _copy_runs(pool, first, out)
        else:
            found = out.new_empty(len(theirs), *out.shape[1:])
            _copy_runs(pool, first, found)
            out.index_copy_(0, torch.tensor(theirs, device=device), found)


def _copy_runs(pool: Tensor, first: Tensor, out: Tensor) -> None:
    """Copy rows `first[i]` on of a pool (rows, H, d) to `out[i]`, of (images, p, H, d)."""
    count, row = out.shape[1], out.shape[2:]
    step = max(1, _ONE_REGION // row.numel())
    for at in range(0, count, step):
        size = min(step, count - at)
        # Every run of `size` rows is an entry; runs overlap each other.
        runs = pool[at:].unfold(0, size, 1).movedim(-1, 1)
        torch.index_select(runs, 0, first, out=out[:, at : at + size])
