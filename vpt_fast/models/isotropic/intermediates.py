"""Intermediates of a tuned transformer of one width, as timm's `forward_intermediates` has them."""

from __future__ import annotations

from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor

from vpt_fast.models.prompt_rows import strip_rows


def without_live_rows(
    model: Any,
    entries: list[Tensor],
    features: Tensor | None,
    images: Tensor,
    indices: int | list[int] | None,
    stop_early: bool,
    output_fmt: str,
) -> tuple[list[Any], Tensor | None]:
    """Return what timm's method found, with live prompt rows stripped.

    Args:
        model: Tuned model.
        entries: Rows of each block that was taken, without prefix tokens: prompts, then patches.
        features: Final features (B, N, D), or None.
        images: Images (B, channels, height, width).
        indices, stop_early: timm's arguments.
        output_fmt: "NCHW", or anything else for rows.

    Returns:
        The patches of each entry (B, D, h, w) or (B, h * w, D), and the features.
    """
    depth = len(model.blocks)
    taken, last = feature_take_indices(depth, indices)
    patches = [
        rows[:, model.rows_leaving(index) :]
        for index, rows in zip(sorted(taken), entries, strict=True)
    ]
    if output_fmt == "NCHW":
        grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
        patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
    if features is None:
        return patches, None
    stop = last if stop_early else depth - 1
    pooled = stop == depth - 1 and model.pools_prompts()
    count = 0 if pooled else model.rows_leaving(stop)
    return patches, strip_rows(features, count, model.num_prefix_tokens)
