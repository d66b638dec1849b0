"""A frozen block's weights and settings, and what its forward pass saves for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vpt_fast.ops.block.add_norm import SavedInput
from vpt_fast.ops.block.prompt_source import PromptSource


class AttentionPattern(Protocol):
    """Attention that is restricted to parts of the tokens, with its gradients.

    `vpt_fast.ops.window_attention.rows.Windows` is one; arguments and results are documented there.
    """

    @property
    def attend(self) -> Any:
        """Attention of the packed qkv projection."""

    @property
    def gradients(self) -> Any:
        """Gradients of `attend`."""


class BlockWeights(NamedTuple):
    """Frozen weights of a block, as nn.Linear and nn.LayerNorm store them; biases may be None.

    D channels, H * d = A channels of attention, C channels of the MLP's hidden layer.
    """

    norm1_weight: Tensor | None  # (D,)
    norm1_bias: Tensor | None
    qkv_weight: Tensor | None  # (3 A, D); None where there are three projections
    qkv_bias: Tensor | None
    proj_weight: Tensor  # (D, A)
    proj_bias: Tensor | None
    scale1: Tensor | None  # (D,), LayerScale of attention's branch
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    fc1_weight: Tensor  # (C, D), (2 C, D) where it is [gate | value]
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # (D, C)
    fc2_bias: Tensor | None
    position_bias: Tensor | None = None  # (positions, H), of attention in windows
    scale2: Tensor | None = None  # (D,), LayerScale of the MLP's branch, applied by the next block
    branch_scale: Tensor | None = None  # (D,), scale2 of the block before
    rope: Tensor | None = None  # (N', 2 d) or (H, N', 2 d), [sin | cos] of the last N' tokens
    value_weight: Tensor | None = None  # (C, D), of a gated MLP whose fc1 is the gate's alone
    value_bias: Tensor | None = None
    mlpnorm_weight: Tensor | None = None  # (C,), of the norm before fc2
    mlpnorm_bias: Tensor | None = None
    q_weight: Tensor | None = None  # (A, D), of three projections
    k_weight: Tensor | None = None
    v_weight: Tensor | None = None
    q_bias: Tensor | None = None  # (A,), of three projections, or of a qkv_bias in three parts
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    attnnorm_weight: Tensor | None = None  # (A,), of the norm before proj
    attnnorm_bias: Tensor | None = None

    @property
    def joins_bias(self) -> bool:
        """Whether qkv_bias has to be put together."""
        return self.qkv_weight is not None and self.q_bias is not None

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """Return the weights with the operands of matrix products in `dtype`, qkv_bias in one."""
        if self.joins_bias:
            parts: Any = (self.q_bias, self.k_bias, self.v_bias)
            joined = torch.cat(parts)
            return self._replace(qkv_bias=joined, q_bias=None, k_bias=None, v_bias=None).to(dtype)
        matrices = ("qkv", "q", "k", "v", "proj", "fc1", "fc2", "value")
        names = [f"{matrix}_{part}" for matrix in matrices for part in ("weight", "bias")]
        changed = {n: t.to(dtype) for n in names if (t := getattr(self, n)) is not None}
        return self._replace(**changed)


@dataclass(frozen=True)
class BlockConfig:
    """Settings of a block, none of which is a tensor.

    Attributes:
        heads: Number of heads H.
        scale: Factor of the attention scores.
        eps1: Epsilon of norm1.
        eps2: Epsilon of norm2.
        activation: One of `vpt_fast.ops.rowwise.activation.KINDS`.
        memory: One of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        source: Source of the block's prompts, or None.
        windows: Windows that attention is restricted to, or None.
        queries: Number of first rows that are computed; None computes all.
        rotate_half: Which channels are a pair for `rope`; see `vpt_fast.ops.rowwise.rotation`.
        gate: Half of the MLP's hidden layer that is activated and multiplied with the other,
            "first" or "last"; "" if it is not gated.
        mlp_eps: Epsilon of the norm before fc2; None without one.
        attn_eps: Epsilon of the norm before proj; None without one.
        centred: Whether norm1 and norm2 subtract the mean; RMSNorm does not.
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
    rotate_half: bool = False
    gate: str = ""
    mlp_eps: float | None = None
    attn_eps: float | None = None
    centred: bool = True

    def saves_kv(self, kv: Tensor) -> bool:
        """Return whether K_p, V_p (B or 1, p, 2, H, d) are saved for backward.

        Those that the batch shares are small beside the tokens' and always saved.
        """
        if self.source is None or not self.source.saves_kv:
            return False
        return self.memory == "speed" or kv.shape[0] == 1


class SavedBlock(NamedTuple):
    """What the backward pass of a block reads of its forward pass; None where it is recomputed."""

    entry: SavedInput
    kv: Tensor | None = None  # (B or 1, p, 2, H, d), K_p and V_p
    kv_statistics: tuple[Tensor, ...] = ()  # of norm1(P)
    tokens: tuple[Tensor, ...] = ()  # q, k, v as `vpt_fast.ops.attention` takes them
    out: Tensor | None = None  # (B, M, A), attention's output
    lse: Tensor | None = None  # (B, H, M), its base-2 log-sum-exp
    middle: Tensor | None = None  # (B, M, D), x'
    statistics: Tensor | None = None  # (2, B, M), row statistics of x'
    hidden: Tensor | None = None  # (B, M, C or 2 C), fc1's output


def contiguous(tensor: Any) -> Any:
    """Return the tensor, copied if it is not contiguous; None stays None."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
