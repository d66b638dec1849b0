"""The launches of windowed attention for a problem, without a GPU, to read the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vpt_fast.kernels.runtime.launch import Launch, Target
from vpt_fast.kernels.window_attention.forward import forward_launch
from vpt_fast.kernels.window_attention.gradients import backward_launches, empty_gradients
from vpt_fast.kernels.window_attention.grid import Pair, window_grid


class WindowProblem(NamedTuple):
    """One call of windowed attention; by default that of Swin-T's first stage at 224 px.

    Attributes:
        size: Tokens H, W of an image.
        window: Rows and columns of a window.
        shift: Rows and columns that the image is rolled by.
        num_prompts: Number of prompts p.
        num_heads: Number of heads h.
        head_dim: Channels per head d.
        dtype: Dtype of all tensors except fp32 statistics.
        batch: Number of images B.
        shared_prompts: Whether the batch shares the prompts.
    """

    size: Pair = (56, 56)
    window: Pair = (7, 7)
    shift: Pair = (3, 3)
    num_prompts: int = 10
    num_heads: int = 3
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    batch: int = 64
    shared_prompts: bool = True


def window_plan(
    problem: WindowProblem,
    target: Target,
    *,
    needs_tokens: bool = True,
    needs_prompts: bool = True,
    needs_table: bool = False,
) -> dict[str, Launch]:
    """Return the launches of a forward and a backward pass by name, on tensors without memory.

    The code that makes the real launches makes these.

    Args:
        problem: Shapes and dtype.
        target: Target to compile for, such as `Target(90)`.
        needs_tokens: Whether the backward pass computes the gradient of the tokens.
        needs_prompts: Whether it computes the gradient of prompt_kv.
        needs_table: Whether it computes the gradient of the bias table.
    """
    batch, heads, dim = problem.batch, problem.num_heads, problem.head_dim
    rows, columns = problem.window

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qkv = empty(batch, *problem.size, 3, heads, dim)
    pad = empty(3, heads, dim)
    table = empty((2 * rows - 1) * (2 * columns - 1), heads)
    prompts = None
    if problem.num_prompts:
        images = 1 if problem.shared_prompts else batch
        prompts = empty(images, problem.num_prompts, 2, heads, dim)
    out = empty(batch, *problem.size, heads * dim)
    lse = empty(batch, heads, *problem.size, dtype=torch.float32)
    geometry = (problem.window, problem.shift, dim**-0.5)
    grid = window_grid(qkv, prompts, problem.window, problem.shift)
    forward = forward_launch(qkv, pad, table, prompts, out, lse, *geometry, target)
    backward = backward_launches(
        qkv, pad, table, prompts, out, lse, torch.empty_like(out),
        empty_gradients(qkv, grid, needs_tokens, needs_prompts, needs_table), *geometry,
        target,
    )  # fmt: skip
    return {launch.name: launch for launch in (forward, *backward)}
