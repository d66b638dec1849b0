"""What the p rows of VAPT's experts are made from. This module needs no triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureInputs(NamedTuple):
    """From the mix to the prompts: g = (mixed * weight + mix_sum * shift) * channels + bias.

    Attributes:
        mixed: (B, p, D), fp32 at least.
        mix_sum: row sums of the mixing matrix, (p,), in the same dtype.
        weight, shift: affine of the LayerNorm whose rows were mixed without it, (D,).
        bias: of the token-wise projector, (p,), or None.
        channels: mask of the channel dropout (B, D), scaled, or None.
        down, up: the feature projector, (r, D) and (D, r).
        hidden: mask of its hidden layer's dropout (B, p, r), scaled, or None.
    """

    mixed: Tensor
    mix_sum: Tensor
    weight: Tensor
    shift: Tensor
    bias: Tensor | None
    channels: Tensor | None
    down: Tensor
    up: Tensor
    hidden: Tensor | None
