"""Normalisation modules: which are a LayerNorm and nothing else, and norm1 of prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from torch import Tensor, nn

from vpt_fast.modules.hooks import has_own_forward

# Exactly these classes: a subclass may compute anything.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
_RMS_NORMS = (nn.RMSNorm, RmsNorm, RmsNormFp32)


def is_layer_norm(norm: nn.Module) -> bool:
    """Return whether `norm` computes a LayerNorm and nothing else."""
    return type(norm) in _LAYER_NORMS and not has_own_forward(norm)


def is_rms_norm(norm: nn.Module) -> bool:
    """Return whether `norm` computes an RMSNorm of its last dimension and nothing else."""
    known = type(norm) in _RMS_NORMS and not has_own_forward(norm)
    return known and getattr(norm, "eps", None) is not None


def normalised_prompts(norm: Any, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a block's norm1 of prompts (B or 1, p, D) in `dtype`, past its hooks.

    A LayerNorm is computed in the prompts' own dtype, which is fp32 at least for prompt experts.

    Args:
        norm: norm1 of the block.
        prompts: Prompts P.
        dtype: Dtype of the result.
    """
    if not is_layer_norm(norm):
        result: Tensor = norm.forward(prompts.to(dtype))
        return result
    weight, bias = (None if t is None else t.to(prompts.dtype) for t in (norm.weight, norm.bias))
    return F.layer_norm(prompts, prompts.shape[-1:], weight, bias, norm.eps).to(dtype)
