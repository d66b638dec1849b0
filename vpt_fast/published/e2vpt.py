"""E2VPT: prompts with masks, and keys and values of their own; pruned after a first training.

"E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning" (ICCV 2023, arXiv 2307.13770).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.methods import PromptMethod, register_method
from vpt_fast.methods.fields import check_count, check_dropout
from vpt_fast.modules.block_info import BlockInfo
from vpt_fast.modules.prompt_module import PromptModule, Prompts


@dataclass(frozen=True)
class E2VPT(PromptMethod):
    """VPT-Deep with masks on its prompts, and keys and values that join attention as they are.

    P' = P * token_mask * piece_mask; K = [K_n; K_p; K_x], V = [V_n; V_p; V_x]. All blocks share the
    masks, which are 1 until `prune` sets some of them to 0.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of dropout of prompts, and of the keys and values, an independent mask
            per image and block; in [0, 1).
        num_keys: Number n of keys and values of each block, at least 1.
        pieces: Number of equal pieces that a prompt's channels are divided into, at least 1.
        prune_tokens: Share of the prompts that `vpt-fast train --rewind` prunes, in [0, 1).
        prune_pieces: Share of the pieces of the other prompts that it prunes, in [0, 1).

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    num_keys: int = 5
    pieces: int = 8
    prune_tokens: float = 0.2
    prune_pieces: float = 0.2

    paper: ClassVar[str] = "ICCV 2023, arXiv 2307.13770"
    equation: ClassVar[str] = "P = P * masks; K = [K_n; K_p; K_x], V = [V_n; V_p; V_x]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_keys", self.num_keys, 1)
        check_count("pieces", self.pieces, 1)
        for name in ("prune_tokens", "prune_pieces"):
            check_dropout(name, getattr(self, name))

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return which of `depth` blocks get prompts, or keys and values alone: all of them."""
        return tuple(range(depth))


class Masks(nn.Module):
    """Masks of tokens and of pieces of their channels, for all blocks.

    Args:
        method: Settings of the method.
        block: A block.

    Raises:
        ValueError: If the width is no multiple of the number of pieces.
    """

    token_mask: Tensor  # (p,)
    piece_mask: Tensor  # (p, pieces)

    def __init__(self, method: E2VPT, block: BlockInfo) -> None:
        super().__init__()
        if block.width % method.pieces:
            raise ValueError(
                f"pieces={method.pieces} does not divide the model's width of {block.width}"
            )
        self.register_buffer("token_mask", torch.ones(method.num_prompts))
        self.register_buffer("piece_mask", torch.ones(method.num_prompts, method.pieces))

    def forward(self, rows: Tensor) -> Tensor:
        """Return prompts (p, D) times both masks."""
        masks = self.token_mask[:, None] * self.piece_mask
        pieces = rows.unflatten(-1, (masks.shape[1], -1))
        return (pieces * masks[..., None]).flatten(-2)


@register_method("e2vpt", E2VPT, Masks)
class MaskedPrompts(PromptModule):
    """Prompts, keys and values of one block.

    Args:
        method: Settings of the method.
        block: The block.
    """

    def __init__(self, method: E2VPT, block: BlockInfo) -> None:
        super().__init__()
        self.tokens = block.new_parameter(method.num_prompts, block.width)
        self.keys, self.values = (
            block.new_parameter(method.num_keys, block.num_heads, block.head_dim) for _ in range(2)
        )

    def forward(self) -> Prompts:
        """Return the masked prompts (p, D), if any, and the keys and values (n, H, d)."""
        rows = self.shared(self.tokens) if len(self.tokens) else None
        return Prompts(rows, self.keys, self.values)


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    tokens: float,
    pieces: float,
) -> tuple[int, int]:
    """Set the masks of the least important tokens and pieces to 0, of those that are left.

    The importance of a mask's entry m is the mean over the batches of |dL / dm|, L the
    cross-entropy. Tokens are pruned first, then pieces among the tokens that are left.

    Args:
        model: Trained model, tuned with `E2VPT`.
        batches: Training images (B, channels, height, width) and labels (B,), on its device.
        tokens: Share of the tokens to prune, in [0, 1).
        pieces: Share of the pieces of the other tokens to prune, in [0, 1).

    Returns:
        Numbers of tokens and of pieces that were pruned.

    Raises:
        ValueError: If the model is tuned with another method, a share is out of range, or there is
            no image.
    """
    found = [module for module in model.modules() if isinstance(module, Masks)]
    if not found:
        raise ValueError("only a model that was tuned with E2VPT has masks to prune")
    for name, share in (("tokens", tokens), ("pieces", pieces)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; give a share in [0, 1)")
    pruned = [0, 0]
    scores = _importance(model, found, batches)
    for masks, (of_tokens, of_pieces) in zip(found, scores, strict=True):
        present = masks.token_mask.nonzero().flatten()
        count = int(tokens * len(present))
        masks.token_mask[present[of_tokens[present].argsort()[:count]]] = 0
        left = (masks.token_mask[:, None] * masks.piece_mask).flatten().nonzero().flatten()
        least = left[of_pieces.flatten()[left].argsort()][: int(pieces * len(left))]
        masks.piece_mask.view(-1)[least] = 0
        pruned = [pruned[0] + count, pruned[1] + len(least)]
    return pruned[0], pruned[1]


def _importance(
    model: nn.Module, masks: list[Masks], batches: Iterable[tuple[Tensor, Tensor]]
) -> list[list[Tensor]]:
    """Return the mean of |dL / dm| of both masks of each module."""
    buffers: list[Tensor] = [t for m in masks for t in (m.token_mask, m.piece_mask)]
    sums, count = [torch.zeros_like(t) for t in buffers], 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for buffer in buffers:
            buffer.requires_grad_(True)
        for images, labels in batches:
            with torch.enable_grad():
                loss = F.cross_entropy(model(images), labels)
                grads: Any = torch.autograd.grad(loss, buffers)
            for total, grad in zip(sums, grads, strict=True):
                total += grad.abs()
            count += 1
    finally:
        for buffer in buffers:
            buffer.requires_grad_(False)
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("pruning needs training images; there are none")
    means = [total / count for total in sums]
    return [means[i : i + 2] for i in range(0, len(means), 2)]
