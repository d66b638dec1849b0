"""What a problem would launch, without a GPU: to compile the kernels offline and read them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vpt_fast.kernels.attention.forward import forward_launch
from vpt_fast.kernels.attention.gradients import backward_launches
from vpt_fast.kernels.attention.launch_table import TABLE
from vpt_fast.kernels.attention.layouts import split, split_prompts
from vpt_fast.kernels.attention.tiles import Table
from vpt_fast.kernels.runtime.chunks import chunk_count
from vpt_fast.kernels.runtime.launch import Launch, Target


class AttentionProblem(NamedTuple):
    """One call of prompt attention.

    Attributes:
        num_keys: tokens N.
        num_prompts: prompts p.
        head_dim: channels of a head d.
        dtype: of tokens and prompts.
        num_queries: queries M of the last block; None where q, k and v are packed (M = N).
        batch: images B.
        num_heads: heads H.
        shared_prompts: whether the batch shares the prompts.
    """

    num_keys: int
    num_prompts: int
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    num_queries: int | None = None
    batch: int = 64
    num_heads: int = 12
    shared_prompts: bool = True

    def useful_flops(self) -> int:
        """Multiply-adds times 2 of the forward's two products, for one head of one image."""
        queries = self.num_queries or self.num_keys
        return 4 * queries * (self.num_keys + self.num_prompts) * self.head_dim


def attention_plan(
    problem: AttentionProblem,
    target: Target,
    *,
    needs_tokens: bool = True,
    needs_prompts: bool = True,
    table: Table = TABLE,
    device: torch.device | str = "meta",
) -> dict[str, list[Launch]]:
    """The launches of a forward and of a backward pass, in order, on tensors without memory.

    They are made by the code that makes the real ones; only their tensors are torch "meta" tensors,
    at addresses that are multiples of 16, as allocators give them.

    Args:
        problem: shapes and dtype.
        target: what to tune for, such as `Target(90)`.
        needs_tokens: whether the backward pass computes the tokens' gradients.
        needs_prompts: whether it computes the prompts' gradients.
        table: where to look up the tiles.
        device: of the tensors; on another one they are real and not initialised.

    Returns:
        {"forward": launches, "backward": launches}. `Launch.signature()`, `.compile_constexprs()`,
        `.divisible_by_16()`, `.num_warps` and `.num_stages` are what triton.compile needs;
        `.grid` and `.trips` say how much of it runs.
    """
    batch, heads, dim = problem.batch, problem.num_heads, problem.head_dim

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if problem.num_queries is None:
        tokens = [empty(batch, problem.num_keys, 3, heads, dim)]
    else:
        queries = empty(batch, problem.num_queries, heads, dim)
        tokens = [queries, empty(batch, problem.num_keys, 2, heads, dim)]
    q, k, v = split(tokens)
    out = empty(batch, q.shape[1], heads * dim)
    lse = empty(batch, heads, q.shape[1], dtype=torch.float32)
    prompts = prompt_grads = None
    if problem.num_prompts:
        shared = problem.shared_prompts and batch > 1
        rows = (problem.num_prompts, 2, heads, dim)
        prompts = split_prompts([empty(1 if shared else batch, *rows)])
        if shared:
            chunks = chunk_count(batch)
            prompt_grads = split_prompts([empty(chunks, *rows, dtype=torch.float32)])
        else:
            prompt_grads = split_prompts([empty(batch, *rows)])
    scale = dim**-0.5
    forward = forward_launch(q, k, v, prompts, out, lse, scale, target, table)
    backward = backward_launches(
        (q, k, v),
        prompts,
        out,
        torch.empty_like(out),
        lse,
        torch.empty_like(lse),
        split([torch.empty_like(t) for t in tokens]) if needs_tokens else None,
        prompt_grads if needs_prompts else None,
        scale,
        target,
        table,
    )
    return {"forward": [forward], "backward": backward}
