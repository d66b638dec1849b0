"""VAPT's experts in one block, before attention, in the implementations that are compared.

The result is norm1 of the tokens and of the prompts that the experts compute from them, forward and
backward. "concat" is the equations as published (`vpt_fast.reference.vit.ConcatenatedExperts`); the
other names are those of `bench.providers.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from bench.compare.correctness import WORST, Check, Results, budget, largest_error
from bench.compare.rounds import ProviderResult, time_interleaved
from bench.providers.models import OURS, provide, set_values, trained, values
from vpt_fast import VAPT
from vpt_fast.ops.block.add_norm import DeferredSum

PROVIDERS = ("concat", "concat_compiled", OURS)
_BLOCK = 1
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function of tokens (B, N, D) that returns norm1 of them and of their prompts (B, p, D)."""


@dataclass(frozen=True)
class ExpertCase:
    """Shapes and model of one comparison; dropout is off."""

    prompts: int = 50
    batch: int = 8
    model: str = "vit_small_patch16_224"
    providers: tuple[str, ...] = ("concat", OURS)

    def __str__(self) -> str:
        return f"experts-{self.model}-p{self.prompts}-b{self.batch}"

    def module(self, name: str) -> Any:
        """Return a model of two blocks, the second of which has experts."""
        torch.manual_seed(0)
        model = timm.create_model(self.model, depth=_BLOCK + 1).eval()
        return provide(name, model, VAPT(self.prompts, projector_dropout=0, channel_dropout=0))

    def inputs(
        self, model: Any, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return seeded tokens, and the gradients of both results."""
        generator = torch.Generator().manual_seed(1)
        patches = model.patch_embed.num_patches + model.num_prefix_tokens

        def draw(rows: int) -> Tensor:
            drawn = torch.randn(self.batch, rows, model.embed_dim, generator=generator)
            return drawn.to(device, dtype)

        return draw(patches).requires_grad_(), draw(patches), draw(self.prompts)


def _eager(module: Any) -> Forward:
    norm = module.model.blocks[_BLOCK].norm1
    return lambda x: (norm(x), norm(module.experts(_BLOCK, x)))


def _ours(module: Any) -> Forward:
    block = module.blocks[_BLOCK]
    return lambda x: block.prompt.with_norm(DeferredSum(x), block.norm1)[1:]


@dataclass(frozen=True)
class ExpertProvider:
    """A provider, ready to run."""

    module: Any
    forward: Forward
    inputs: tuple[Tensor, Tensor, Tensor]

    def run(self) -> Results:
        """Return both results, and the gradients of the tokens and of the experts."""
        x, *grads = self.inputs
        parameters = [(name, p) for name, (p, row) in self._experts()]
        x.grad = None
        for _, parameter in parameters:
            parameter.grad = None
        results = self.forward(x)
        torch.autograd.backward(results, grads)
        found = {"norm": results[0].detach(), "prompts": results[1].detach(), "tokens": x.grad}
        return {**found, **{name: parameter.grad for name, parameter in parameters}}

    def _experts(self) -> list[tuple[str, tuple[Any, int | None]]]:
        kinds = (f"blocks.{_BLOCK}.prompt.", "prompt_projector.")
        return [(n, p) for n, p in trained(self.module).items() if n.startswith(kinds)]


def expert_provider(
    case: ExpertCase,
    name: str,
    dtype: torch.dtype,
    given: dict[str, Tensor],
    device: torch.device | str = "cpu",
) -> ExpertProvider:
    """Return a provider whose trained parameters have the given values."""
    module = case.module(OURS if name == OURS else "concat").to(device, dtype)
    set_values(module, given)
    forward = _ours(module) if name == OURS else _eager(module)
    if name == "concat_compiled":
        forward = torch.compile(forward)
    model = module if name == OURS else module.model
    return ExpertProvider(module, forward, case.inputs(model, dtype, device))


def functions(
    case: ExpertCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Callable[[], Results]]:
    """Return the function to time, by provider."""
    given = values(case.module("concat"))
    return {
        name: partial(ExpertProvider.run, expert_provider(case, name, dtype, given, device))
        for name in case.providers
    }


def checks(
    case: ExpertCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Check]:
    """Check every provider against the equations in fp64, as `bench.compare.correctness` does."""
    kind = str(dtype).removeprefix("torch.")
    given = values(case.module("concat"))
    rounded = {name: value.to(dtype) for name, value in given.items()}
    truth = expert_provider(case, "concat", torch.float64, rounded, device).run()

    def error(name: str) -> tuple[float, str]:
        have = expert_provider(case, name, dtype, given, device).run()
        return largest_error({key: value.double() for key, value in have.items()}, truth)

    limit = budget(error("concat")[0], kind)
    return {
        name: Check(name, *error(name), WORST[kind] if name == "concat" else limit)
        for name in case.providers
    }


def check_and_time(case: ExpertCase, rounds: int) -> dict[str, ProviderResult]:
    """Check and time every provider, as `bench.providers.attention.check_and_time` does."""
    kind = torch.float32
    return time_interleaved(checks(case, kind), functions(case, kind), 4 * rounds)
