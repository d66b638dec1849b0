"""Views of queries, keys, values and prompts in their layouts, which `launches` describes.

This module needs no triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor]


def split(tokens: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views of q (B, M, H, d), k and v (B, N, H, d)."""
    if len(tokens) == 1:
        q, k, v = tokens[0].unbind(2)
        return q, k, v
    if len(tokens) == 2:
        k, v = tokens[1].unbind(2)
        return tokens[0], k, v
    if len(tokens) == 3:
        return tokens[0], tokens[1], tokens[2]
    raise ValueError(f"tokens must be 1, 2 or 3 tensors, not {len(tokens)}")


def split_prompts(prompts: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return views of the prompts' k and v (B or 1, p, H, d), or None where there are none."""
    if len(prompts) == 0:
        return None
    if len(prompts) == 1:
        k, v = prompts[0].unbind(2)
        return k, v
    if len(prompts) == 2:
        return prompts[0], prompts[1]
    raise ValueError(f"prompts must be 0, 1 or 2 tensors, not {len(prompts)}")


def existing_prompts(prompts: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the prompts' k and v, or None where there are none or p is 0."""
    pair = split_prompts(prompts)
    return pair if pair is not None and pair[0].shape[1] > 0 else None
