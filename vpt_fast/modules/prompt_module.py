"""Base of the modules that make a block's prompts: what a prompt method trains.

To a frozen block every prompt method is the same thing: prompts P, whose keys and values are
K_p, V_p = norm1(P) W_k + b_k, norm1(P) W_v + b_v, or keys and values themselves. A module makes
them by any differentiable computation; the block reads them beside its tokens' own.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.modules.block_info import FrozenWeights
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block.parts import contiguous
from vpt_fast.ops.block.prompt_source import GIVEN_KV, PromptSource, StaticPrompts, drop

READS = ("nothing", "tokens", "feature")


class Prompts(NamedTuple):
    """What the module of a block makes: rows, keys and values, or all three.

    Attributes:
        rows: Prompts P (p, D), or (B, p, D) for each image, before norm1; or None.
        keys: Keys (n, H, d) or (B, n, H, d) that are attended to as they are, beside those of
            `rows`; or None.
        values: Values in the same shape, or None.
    """

    rows: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


class Made(NamedTuple):
    """Prompts of a block, after prompt dropout.

    Attributes:
        rows: (B or 1, p, D) or None.
        kv: Keys and values (B or 1, n, 2, H, d) beside those of `rows`, or None.
    """

    rows: Tensor | None
    kv: Tensor | None


class PromptModule(nn.Module):
    """What is trained of one block; it makes the block's prompts. Register it by `register_method`.

    The constructor takes the method's settings and a `BlockInfo`. `forward` takes what `reads`
    says:

    - "nothing": nothing. Every image has the same prompts, which are computed once per step.
    - "tokens": the block's input x (B, N, D), prefix tokens first, without prompt rows.
    - "feature": what the method's shared module returned for the input of the first block of this
      width.

    It returns P, as (p, D) or (B, p, D), or `Prompts`. Gradients are autograd's. The numbers of
    prompts may differ by block. Prompt dropout is applied to what `forward` returns.

    Attributes:
        reads: One of "nothing", "tokens" and "feature".
        attends_apart: Whether the tokens attend to the prompts alone before the block, in a softmax
            of its own, x + attention(norm1(x); K_p, V_p), and not with each other.
        dropout: Probability of prompt dropout, from the method's settings.
        num_rows: Number p of prompts.
        num_keys: Number n of keys and values beside those of the prompts.
    """

    reads: ClassVar[str] = "nothing"
    attends_apart: ClassVar[bool] = False
    dropout: float = 0.0
    num_rows: int = 0
    num_keys: int = 0
    _shared: tuple[nn.Module | None, ...] = (None,)

    def forward(self, *inputs: Any) -> Tensor | Prompts:
        """Return the block's prompts, before prompt dropout."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward, which returns the block's prompts"
        )

    def after_dropout(self, rows: Tensor) -> Tensor:
        """Return the prompts of those (p, D) or (B, p, D) that prompt dropout leaves; as they are.

        For methods that compute with prompts after the dropout.
        """
        return rows

    def initialise(self, inputs: Tensor, weights: FrozenWeights) -> None:
        """Set initial values from data, before training; see `vpt_fast.initialise`.

        Args:
            inputs: Inputs (images, N, D) of this block in the model without prompts.
            weights: Frozen weights of the block.
        """

    @property
    def initialises(self) -> bool:
        """Whether the module has initial values from images."""
        return type(self).initialise is not PromptModule.initialise

    def regulariser(self) -> Tensor | None:
        """Return a scalar that training adds to the loss, or None."""
        return None

    @property
    def shared(self) -> Any:
        """Module that all blocks of this width share, or None; not in the constructor."""
        return self._shared[0]

    @property
    def drops(self) -> bool:
        """Whether the module is in training mode and has a dropout."""
        return bool(self.dropout and self.training)

    @property
    def is_static(self) -> bool:
        """Whether every image has the same prompts now."""
        return self.reads == "nothing" and not (self.dropout and self.training)

    @property
    def known_ahead(self) -> bool:
        """Whether the prompts are known before the block's input, or are made inside of a fused
        block."""
        return self.reads != "tokens" and not self.attends_apart

    def static(self) -> tuple[Tensor | None, Tensor | None]:
        """Return prompts (p, D) and kv (1, n, 2, H, d) of a static module that drops nothing."""
        rows, kv = self._called(None, None)
        return None if rows is None else self.after_dropout(rows), kv

    def made(self, x: Tensor, feature: Any = None) -> Made:
        """Return the prompts of a block.

        Args:
            x: Input (B, N, D) of the block.
            feature: What the shared module returned, or None.
        """
        rows, mask, kv = self._drawn(x, feature)
        return Made(rows if mask is None else drop(rows, mask, 1.0 - self.dropout), kv)

    def sources(
        self, x: Tensor, feature: Any = None
    ) -> tuple[PromptSource, tuple[Tensor | None, ...]]:
        """Return the prompt source of a fused block, and its tensors; arguments as for `made`.

        A method with a hand-written backward pass returns a source of its own.
        """
        return fused_source(*self._drawn(x, feature), 1.0 - self.dropout, computing_dtype(x))

    def _drawn(self, x: Tensor, feature: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        """Return rows (B or 1, p, D), a mask (B, p, D) that still has to be applied, and kv."""
        rows, kv = self._called(x, feature)
        mask = None
        if rows is not None and rows.ndim == 2:
            rows = rows.unsqueeze(0)
        if self.drops and rows is not None:
            if rows.shape[0] == 1 and type(self).after_dropout is PromptModule.after_dropout:
                mask = F.dropout(rows.new_ones(x.shape[0], *rows.shape[1:]), self.dropout).bool()
            else:
                rows = F.dropout(rows.expand(x.shape[0], -1, -1), self.dropout)
        if self.drops and kv is not None:
            kv = F.dropout(kv.expand(x.shape[0], -1, -1, -1, -1), self.dropout)
        return None if rows is None else self.after_dropout(rows), mask, kv

    def _called(self, x: Tensor | None, feature: Any) -> Made:
        """Return what `forward` does, its keys and values as one tensor (B or 1, n, 2, H, d)."""
        inputs = {"nothing": (), "tokens": (x,), "feature": (feature,)}[self.reads]
        if self.reads == "feature" and feature is None:
            raise ValueError(
                "this block's prompts come from a feature of the image, which the model computes "
                "in forward and forward_features without attn_mask and is_causal; a block, timm's "
                "loop over the blocks and a model whose `blocks` are hooked have none"
            )
        made = self(*inputs)
        rows, keys, values = (made, None, None) if isinstance(made, Tensor) else made
        if keys is None or values is None:
            return Made(rows, None)
        kv = torch.stack([keys, values], -3)
        return Made(rows, kv.unsqueeze(0) if kv.ndim == 4 else kv)

    def extra_repr(self) -> str:
        """Return the dropout, for the printed model."""
        return f"dropout={self.dropout}"


def fused_source(
    rows: Tensor | None, mask: Tensor | None, kv: Tensor | None, keep: float, dtype: torch.dtype
) -> tuple[PromptSource, tuple[Tensor | None, ...]]:
    """Return the source of a fused block whose prompts are computed already, and its tensors.

    Args:
        rows: Prompts (B or 1, p, D), or None.
        mask: Booleans (B, p, D) that are False where prompt dropout drops them, or None.
        kv: Keys and values (B or 1, n, 2, H, d) beside those of the rows, or None.
        keep: Probability with which the mask is True.
        dtype: Dtype of the block's products.
    """
    own = () if kv is None else (contiguous(kv.to(dtype)),)
    if rows is None:
        return GIVEN_KV, own
    return StaticPrompts(keep, kv is not None), (contiguous(rows), mask, *own)
