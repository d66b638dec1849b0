"""Inputs of VAPT's feature projector. This module needs no triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureInputs(NamedTuple):
    """Inputs of the feature projector, whose output is the prompts P.

    g = (mixing * norm_weight + mixing_sum * norm_bias) * channel_mask + projector_bias
    P = g + up (relu(down g) * hidden_mask)

    Attributes:
        mixing: Token mixing without the norm's affine, (B, p, D), fp32 at least.
        mixing_sum: Row sums of the mixing weight, (p,), in the same dtype.
        norm_weight, norm_bias: Weight and bias of the experts' LayerNorm, (D,).
        projector_bias: Bias of the token-wise projector, (p,), or None.
        channel_mask: Scaled dropout mask of channels, (B, D), or None.
        down, up: Weights of the feature projector, (r, D) and (D, r).
        hidden_mask: Scaled dropout mask of its hidden layer, (B, p, r), or None.
    """

    mixing: Tensor
    mixing_sum: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    projector_bias: Tensor | None
    channel_mask: Tensor | None
    down: Tensor
    up: Tensor
    hidden_mask: Tensor | None
