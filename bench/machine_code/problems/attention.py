"""The launches that prompt attention makes for a problem, and the matrix work the problem needs.

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

import torch

from bench.machine_code.offline import Architecture
from bench.machine_code.problems.attention_launches import AttentionProblem, attention_plan
from vpt_fast.kernels.attention.ragged import bank_attention_launch
from vpt_fast.kernels.runtime.launch import Launch, Target

KERNELS = ("forward", "dq", "token_dkdv", "shared_prompt_dkdv")
"""Names of the launches of a training step whose prompts are shared by the batch."""

OTHER_KERNELS = ("prompt_dkdv", "delta", "ragged_forward")
"""Those with prompts of each image's own, with tokens that need no gradient, and of a batch whose
images belong to many tasks."""


def launch_target(architecture: Architecture) -> Target:
    """What the launch table calls an architecture."""
    if isinstance(architecture, int):
        return Target(architecture)
    return Target(0, hip=True)


def attention_launches(
    problem: AttentionProblem, architecture: Architecture, needs_tokens: bool = True
) -> dict[str, Launch]:
    """The launches of a forward and a backward pass by name, as the launchers make them.

    Args:
        problem: shapes and dtype.
        architecture: what the launch table tunes for.
        needs_tokens: whether tokens need a gradient.

    Returns:
        Launches on tensors without memory, which count as aligned.
    """
    plan = attention_plan(problem, launch_target(architecture), needs_tokens=needs_tokens)
    launches = {launch.name: launch for launch in (*plan["forward"], *plan["backward"])}
    if problem.num_prompts:
        ragged = ragged_launch(problem, architecture)
        launches[ragged.name] = ragged
    return launches


def ragged_launch(problem: AttentionProblem, architecture: Architecture) -> Launch:
    """The forward launch of a batch whose images have p prompts at rest each, of their own task."""
    batch, heads, dim = problem.batch, problem.num_heads, problem.head_dim
    queries = problem.num_queries or problem.num_keys

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = [empty(batch, problem.num_keys, 3, heads, dim)]
    if problem.num_queries is not None:
        keys_values = empty(batch, problem.num_keys, 2, heads, dim)
        tokens = [empty(batch, queries, heads, dim), keys_values]
    rest = empty(batch * problem.num_prompts, 2, heads, dim)
    starts, counts = (empty(batch, dtype=torch.int64) for _ in range(2))
    return bank_attention_launch(
        tokens, rest, empty(1, 2, heads, dim), starts, counts, problem.num_prompts,
        empty(batch, queries, heads * dim), empty(batch, heads, queries, dtype=torch.float32),
        dim**-0.5, launch_target(architecture),
    )  # fmt: skip


def useful_flop(kernel: str, problem: AttentionProblem) -> int:
    """Multiplications and additions of the products that a launch is for (see the module).

    Raises:
        ValueError: for a kernel without matrix products.
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
