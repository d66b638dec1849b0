"""The launches that prompt attention makes for a problem, and the matrix work the problem needs.

Launches are built without a GPU, to compile the kernels offline and read them.

Useful MMA FLOP, per head and image, for M queries, N tokens, p prompts and head dimension d: the
products that the formulas need (FlashAttention-2, algorithms 1 and 2: the backward pass recomputes
S), without padding.

- forward, ragged_forward: 2 products, S = Q K^T and P V, with N + p keys: 4 M (N + p) d
- dq: 3 products, S, dP = dO V^T and dS K, with N + p keys: 6 M (N + p) d
- token_dkdv: 4 products, S, dP, P^T dO and dS^T Q, with the tokens: 8 M N d
- shared_prompt_dkdv, prompt_dkdv: the same with the prompts: 8 M p d

delta, which is launched when tokens need no gradient, has no products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.machine_code.offline import Architecture
from vpt_fast.kernels.attention.forward import forward_launch
from vpt_fast.kernels.attention.gradients import backward_launches
from vpt_fast.kernels.attention.launch_table import TABLE
from vpt_fast.kernels.attention.layouts import split, split_prompts
from vpt_fast.kernels.attention.ragged import bank_attention_launch
from vpt_fast.kernels.attention.tiles import Table
from vpt_fast.kernels.runtime.chunks import chunk_count
from vpt_fast.kernels.runtime.launch import Launch, Target

KERNELS = ("forward", "dq", "token_dkdv", "shared_prompt_dkdv")
"""Names of the launches of a training step whose prompts are shared by the batch."""

OTHER_KERNELS = ("prompt_dkdv", "delta", "ragged_forward")
"""Launches for prompts of each image's own, for tokens that need no gradient, and for a batch whose
images belong to many tasks.
"""


class AttentionProblem(NamedTuple):
    """One call of prompt attention.

    Attributes:
        num_keys: Number of tokens N.
        num_prompts: Number of prompts p.
        head_dim: Channels per head d.
        dtype: Dtype of tokens and prompts.
        num_queries: Queries M of the last block; None if q, k and v are packed (M = N).
        batch: Number of images B.
        num_heads: Number of heads H.
        shared_prompts: Whether the batch shares the prompts.
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
        """Return the FLOP of the forward's two products, for one head of one image."""
        queries = self.num_queries or self.num_keys
        return 4 * queries * (self.num_keys + self.num_prompts) * self.head_dim


def launch_target(architecture: Architecture) -> Target:
    """Return the launch table's name for an architecture."""
    if isinstance(architecture, int):
        return Target(architecture)
    return Target(0, hip=True)


def attention_plan(
    problem: AttentionProblem,
    target: Target,
    *,
    needs_tokens: bool = True,
    needs_prompts: bool = True,
    table: Table = TABLE,
    device: torch.device | str = "meta",
) -> dict[str, list[Launch]]:
    """Return the launches of a forward and a backward pass, in order, on tensors without memory.

    The code that makes the real launches makes these; only their tensors are torch "meta" tensors,
    with addresses that count as multiples of 16, as allocators return them.

    Args:
        problem: Shapes and dtype.
        target: Target of the launch table, such as `Target(90)`.
        needs_tokens: Whether the backward pass computes the tokens' gradients.
        needs_prompts: Whether it computes the prompts' gradients.
        table: Launch table to look up the tiles in.
        device: Device of the tensors; other than "meta" they are real and uninitialised.

    Returns:
        {"forward": launches, "backward": launches}.
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


def attention_launches(
    problem: AttentionProblem, architecture: Architecture, needs_tokens: bool = True
) -> dict[str, Launch]:
    """Return the launches of a forward and a backward pass by name.

    Args:
        problem: Shapes and dtype.
        architecture: Architecture to look up in the launch table.
        needs_tokens: Whether tokens need a gradient.

    Returns:
        Launches on tensors without memory, which count as aligned. With prompts, that of a batch of
        many tasks is included.
    """
    plan = attention_plan(problem, launch_target(architecture), needs_tokens=needs_tokens)
    launches = {launch.name: launch for launch in (*plan["forward"], *plan["backward"])}
    if problem.num_prompts:
        ragged = ragged_launch(problem, architecture)
        launches[ragged.name] = ragged
    return launches


def ragged_launch(problem: AttentionProblem, architecture: Architecture) -> Launch:
    """Return the forward launch of a batch of many tasks with p cached prompts per image."""
    batch, heads, dim = problem.batch, problem.num_heads, problem.head_dim
    queries = problem.num_queries or problem.num_keys

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = [empty(batch, problem.num_keys, 3, heads, dim)]
    if problem.num_queries is not None:
        kv = empty(batch, problem.num_keys, 2, heads, dim)
        tokens = [empty(batch, queries, heads, dim), kv]
    cached = empty(batch * problem.num_prompts, 2, heads, dim)
    offsets, counts = (empty(batch, dtype=torch.int64) for _ in range(2))
    return bank_attention_launch(
        tokens, cached, empty(1, 2, heads, dim), offsets, counts, problem.num_prompts,
        empty(batch, queries, heads * dim), empty(batch, heads, queries, dtype=torch.float32),
        dim**-0.5, launch_target(architecture),
    )  # fmt: skip


def useful_flop(kernel: str, problem: AttentionProblem) -> int:
    """Return the FLOP of the products that a launch computes (see the module).

    Raises:
        ValueError: If the kernel has no matrix products.
    """
    tokens, prompts = problem.num_keys, problem.num_prompts
    products_and_keys = {
        "forward": (2, tokens + prompts),
        "ragged_forward": (2, tokens + prompts),
        "dq": (3, tokens + prompts),
        "token_dkdv": (4, tokens),
        "shared_prompt_dkdv": (4, prompts),
        "prompt_dkdv": (4, prompts),
    }
    if kernel not in products_and_keys:
        raise ValueError(f"kernel {kernel!r}: use one of {', '.join(products_and_keys)}")
    products, keys = products_and_keys[kernel]
    queries = problem.num_queries or tokens
    heads = problem.batch * problem.num_heads
    return 2 * products * queries * keys * problem.head_dim * heads
