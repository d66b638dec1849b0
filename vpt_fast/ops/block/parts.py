"""What a frozen block consists of, and what of its forward pass is kept for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vpt_fast.ops.block.add_norm import SavedInput
from vpt_fast.ops.block.prompt_source import PromptSource


class AttentionPattern(Protocol):
    """Which tokens attend to which, where that is not all to all: `attend` and its `gradients`.

    `vpt_fast.ops.window_attention.rows.Windows` is one, and says what they take and return.
    """

    @property
    def attend(self) -> Any:
        """Attention of the packed projection."""

    @property
    def gradients(self) -> Any:
        """Its gradients."""


class BlockWeights(NamedTuple):
    """The frozen weights of a block, as nn.Linear and nn.LayerNorm have them; biases may be None.

    D channels, H * d = A channels of attention, C channels of the MLP's hidden layer.
    """

    norm1_weight: Tensor | None  # (D,)
    norm1_bias: Tensor | None
    qkv_weight: Tensor  # (3 A, D)
    qkv_bias: Tensor | None
    proj_weight: Tensor  # (D, A)
    proj_bias: Tensor | None
    scale1: Tensor | None  # (D,), LayerScale
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    fc1_weight: Tensor  # (C, D)
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # (D, C)
    fc2_bias: Tensor | None
    position_bias: Tensor | None = None  # (positions, H), of attention in windows
    scale2: Tensor | None = None  # (D,), LayerScale of the MLP's output, left to its reader
    branch_scale: Tensor | None = None  # (D,), LayerScale of the branch that enters

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """With what matrix products read in `dtype`; norms read any."""
        matrices = ("qkv", "proj", "fc1", "fc2")
        names = [f"{matrix}_{part}" for matrix in matrices for part in ("weight", "bias")]
        changed = {n: t.to(dtype) for n in names if (t := getattr(self, n)) is not None}
        return self._replace(**changed)


@dataclass(frozen=True)
class BlockConfig:
    """What of a block is no tensor.

    Attributes:
        heads: H.
        scale: factor of the attention scores.
        eps1, eps2: of norm1 and norm2.
        activation: one of `vpt_fast.ops.rowwise.activation.KINDS`.
        memory: one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        source: of the block's prompts, or None.
        windows: where attention is in windows of an image's rows, or None.
        queries: how many of the first rows are computed, where no other is read; None for all.
    """

    heads: int
    scale: float
    eps1: float
    eps2: float
    activation: str
    memory: str
    source: PromptSource | None
    windows: AttentionPattern | None = None
    queries: int | None = None

    def saves_kv(self, kv: Tensor) -> bool:
        """Whether the prompts' keys (B or 1, p, 2, H, d) are kept for backward.

        Those that the batch shares weigh nothing beside its tokens.
        """
        if self.source is None or not self.source.saves_kv:
            return False
        return self.memory == "speed" or kv.shape[0] == 1


class SavedBlock(NamedTuple):
    """What backward needs of forward; None for what it computes again."""

    entry: SavedInput  # of the block's input, and of what its experts mix
    kv: Tensor | None = None  # (B or 1, p, 2, H, d), the prompts'
    prompt_statistics: tuple[Tensor, ...] = ()
    tokens: tuple[Tensor, ...] = ()  # qkv (B, N, 3, H, d); or q (B, M, H, d), kv (B, N, 2, H, d)
    out: Tensor | None = None  # (B, M, A)
    lse: Tensor | None = None  # (B, H, M)
    middle: Tensor | None = None  # (B, M, D), x'
    statistics: Tensor | None = None  # (2, B, M), of x'
    hidden: Tensor | None = None  # (B, M, C), fc1's output


def contiguous(tensor: Any) -> Any:
    """The tensor, copied if it is not contiguous; None stays None."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
