"""Which implementation computes a tensor: its device and dtype decide, and nothing else."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vpt_fast.kernels.constants import MAX_HEAD_DIM

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def uses_kernels(tensor: Tensor, head_dim: int = 0) -> bool:
    """True where the Triton kernels take `tensor`: on CUDA (or ROCm), in fp32, fp16 or bf16.

    Args:
        tensor: Input of an operation.
        head_dim: Channels of a head, for operations on heads.
    """
    return tensor.is_cuda and tensor.dtype in _KERNEL_DTYPES and head_dim <= MAX_HEAD_DIM


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics of `dtype` are held in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's, or its own; autocast leaves fp64 alone."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def in_full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside, autocast rounds nothing of what is computed on the tensor's device."""
    if tensor.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where a tensor is; on the meta device there is none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
