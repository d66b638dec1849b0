"""Attention with prompts, forward and backward, in the implementations that are compared.

Provider names are those of `bench.providers.models`. Tokens are packed queries, keys and values
(B, N, 3, H, d); prompts (1, p, 3, H, d) are shared by the batch. The prompts' queries are used only
where prompt rows are concatenated, and their results are discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from bench.compare.correctness import WORST, Check, Results, budget, largest_error
from bench.compare.rounds import ProviderResult, time_interleaved
from bench.providers.models import (
    COMPILED,
    CUDNN,
    CUDNN_FIRST,
    OURS,
    PROVIDERS,
    PUBLISHED,
    WITHOUT,
    base,
)
from vpt_fast.ops.attention.operator import prompt_attention

Attention = Callable[[Tensor, Tensor], Tensor]
"""Function of tokens and prompts that returns (B, N, H * d)."""


@dataclass(frozen=True)
class AttentionCase:
    """Shapes of one comparison; the defaults are those of ViT-S/16 at 224 pixels."""

    prompts: int = 50
    batch: int = 8
    tokens: int = 197
    heads: int = 6
    head_dim: int = 64
    providers: tuple[str, ...] = PROVIDERS

    def __str__(self) -> str:
        return f"attention-p{self.prompts}-b{self.batch}-n{self.tokens}"

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return seeded tokens, prompts and the gradient of the result."""
        generator = torch.Generator().manual_seed(1)
        heads = (3, self.heads, self.head_dim)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        width = self.heads * self.head_dim
        return (
            draw(self.batch, self.tokens, *heads).requires_grad_(),
            draw(1, self.prompts, *heads).requires_grad_(),
            draw(self.batch, self.tokens, width),
        )


def _heads(packed: Tensor) -> Any:
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _rows(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _published(tokens: Tensor, prompts: Tensor) -> Tensor:
    count = prompts.shape[1]
    q, k, v = _heads(torch.cat([prompts.expand(len(tokens), -1, -1, -1, -1), tokens], 1))
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return _rows(weights @ v)[:, count:]


def _concat(tokens: Tensor, prompts: Tensor) -> Tensor:
    count = prompts.shape[1]
    q, k, v = _heads(torch.cat([prompts.expand(len(tokens), -1, -1, -1, -1), tokens], 1))
    return _rows(F.scaled_dot_product_attention(q, k, v))[:, count:]


def _keys_concat(tokens: Tensor, prompts: Tensor) -> Tensor:
    kv = torch.cat([prompts[:, :, 1:].expand(len(tokens), -1, -1, -1, -1), tokens[:, :, 1:]], 1)
    k, v = _heads(kv)
    return _rows(F.scaled_dot_product_attention(tokens[:, :, 0].transpose(1, 2), k, v))


def _ours(tokens: Tensor, prompts: Tensor) -> Tensor:
    return prompt_attention([tokens], [prompts[:, :, 1:]], tokens.shape[-1] ** -0.5)


def _without(tokens: Tensor, prompts: Tensor) -> Tensor:
    return _rows(F.scaled_dot_product_attention(*_heads(tokens)))


IMPLEMENTATIONS: dict[str, Attention] = {
    PUBLISHED: _published,
    "concat": _concat,
    "keys_concat": _keys_concat,
    OURS: _ours,
    WITHOUT: _without,
}


def implementation(name: str) -> Attention:
    """Return a provider's function; a compiled one is compiled at its first call."""
    function = IMPLEMENTATIONS[base(name)]
    if name in COMPILED:
        return torch.compile(function)
    return partial(_cudnn_first, function) if name in CUDNN else function


def _cudnn_first(function: Attention, tokens: Tensor, prompts: Tensor) -> Tensor:
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return function(tokens, prompts)


def run(function: Attention, tokens: Tensor, prompts: Tensor, gradient: Tensor) -> Results:
    """Return the result, and the gradients of the tokens and of the prompts' keys and values."""
    tokens.grad = prompts.grad = None
    out = function(tokens, prompts)
    out.backward(gradient)
    found = {"out": out.detach(), "tokens": tokens.grad}
    if prompts.grad is not None:
        found["prompts"] = prompts.grad[:, :, 1:]
    return {name: value for name, value in found.items() if value is not None}


def functions(
    case: AttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Callable[[], Results]]:
    """Return the function to time, by provider."""
    return {
        name: partial(run, implementation(name), *case.inputs(dtype, device))
        for name in case.providers
    }


def checks(
    case: AttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Check]:
    """Check every provider against fp64, as `bench.compare.correctness` does for models."""
    kind = str(dtype).removeprefix("torch.")
    given = case.inputs(dtype, device)
    tokens, prompts = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    wanted = {
        name: run(IMPLEMENTATIONS[name], tokens, prompts, given[2].double())
        for name in (PUBLISHED, WITHOUT)
    }

    def error(name: str) -> tuple[float, str]:
        have = run(implementation(name), *case.inputs(dtype, device))
        want = wanted[WITHOUT if base(name) == WITHOUT else PUBLISHED]
        return largest_error({key: value.double() for key, value in have.items()}, want)

    limit = budget(error("concat")[0], kind)
    limits = {"concat": WORST[kind], WITHOUT: WORST[kind]}
    return {name: Check(name, *error(name), limits.get(name, limit)) for name in case.providers}


def check_and_time(case: AttentionCase, rounds: int) -> dict[str, ProviderResult]:
    """Check every provider in fp32 on the CPU, then time those that pass in interleaved rounds.

    A call takes milliseconds, so four rounds are run for each of `rounds`.
    """
    kind = torch.float32
    return time_interleaved(checks(case, kind), functions(case, kind), 4 * rounds)
