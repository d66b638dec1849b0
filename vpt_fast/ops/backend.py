"""Which implementation computes: the device and dtype of a tensor decide, and nothing else."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vpt_fast.kernels.constants import MAX_HEAD_DIM

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def uses_kernels(tensor: Tensor, head_dim: int = 0) -> bool:
    """Return whether Triton kernels take `tensor`: on CUDA (or ROCm), in fp32, fp16 or bf16.

    Args:
        tensor: Input of an operation.
        head_dim: Channels of a head, for operations on heads.
    """
    return tensor.is_cuda and tensor.dtype in _KERNEL_DTYPES and head_dim <= MAX_HEAD_DIM


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics of tensors in `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's, or that of x; fp64 stays fp64."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def in_full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the tensor's device."""
    if tensor.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def autocasts(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device; never on the meta device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
