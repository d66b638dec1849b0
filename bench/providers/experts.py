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
from torch.autograd.function import once_differentiable

from bench.compare.correctness import WORST, Check, Results, budget, largest_error
from bench.compare.rounds import ProviderResult, time_interleaved
from bench.providers.models import OURS, provide, set_values, trained, values
from vpt_fast import VAPT
from vpt_fast.models.fusion.fused_block import Use, block_config, block_weights
from vpt_fast.ops.block.add_norm import SavedInput, enter, entry_gradients
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.sites import sites_for

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


class _FusedExperts(torch.autograd.Function):
    """The part of a fused block that is compared, as `vpt_fast.ops.block.core` runs it."""

    @staticmethod
    def forward(ctx, steps, x, *sources):  # type: ignore[no-untyped-def]
        y, entry = enter(steps, x, None, sources)
        prompts, statistics = steps.config.source.normalised_prompts(
            steps.sites, sources, entry.mixing, steps.norm1, steps.dtype
        )
        ctx.steps, ctx.counts = steps, (len(sources), len(entry.mixing))
        ctx.save_for_backward(*sources, *entry.mixing, *statistics, entry.x, entry.statistics)
        return y, prompts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_prompts):  # type: ignore[no-untyped-def]
        steps, (first, second) = ctx.steps, ctx.counts
        *saved, x, statistics = ctx.saved_tensors
        sources, mixed = saved[:first], tuple(saved[first : first + second])
        found, grad_mixed = steps.config.source.gradients(
            steps.sites, sources, mixed, steps.norm1, saved[first + second :], grad_prompts
        )
        no_sum: Any = None
        grad_x, _, mixing = entry_gradients(
            steps, SavedInput(x, statistics, mixed), sources, no_sum, grad_y, grad_mixed, None, True
        )
        return None, grad_x, *mixing, *found


def _ours(module: Any) -> Forward:
    block = module.blocks[_BLOCK]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        source, sources = block.prompt.sources(x)
        config = block_config(block, source, Use("speed"))
        sites = sites_for(x, block.attn.head_dim, "experts", source, x.shape, x.dtype)
        steps = BlockSteps(config, block_weights(block), x.dtype, sites)
        results: Any = _FusedExperts.apply(steps, x, *sources)
        return results

    return forward


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
