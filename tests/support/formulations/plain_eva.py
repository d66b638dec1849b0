"""The plain formulation for timm's Eva: prompts concatenated into timm's own blocks.

Prompts are not rotated: each attention's `num_prefix_tokens` is raised by their number for a call.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.formulations.plain import Plain, redraw_prompts, widen
from support.formulations.plain_baselines import PlainBaseline, redraw_added
from support.formulations.plain_vapt import PlainVAPT
from vpt_fast import VAPT, prompt_tune
from vpt_fast.methods.baselines import Baseline


@contextlib.contextmanager
def more_prefix(block: Any, count: int) -> Iterator[None]:
    """Return a context in which a block leaves `count` rows more unrotated."""
    block.attn.num_prefix_tokens += count
    try:
        yield
    finally:
        block.attn.num_prefix_tokens -= count


def embedded(model: Any, image: Tensor) -> tuple[Tensor, list[Any]]:
    """Return the first block's input and the table of each block."""
    x, rope = model._pos_embed(model.patch_embed(image))
    tables = list(rope) if model.rope_mixed and rope is not None else [rope] * len(model.blocks)
    return model.norm_pre(x), tables


class PlainEva(Plain):
    """See `Plain`."""

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, prefix + prompts + patches, D) after each block, and set `self.live`."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x, tables = embedded(model, image)
        self.live = 0
        for index, (block, rope) in enumerate(zip(model.blocks, tables, strict=True)):
            if index in self.blocks:
                tokens = torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)
                prompt = self.prompt_of(index, tokens)
                x = torch.cat([x[:, :prefix], prompt, x[:, prefix + self.live :]], dim=1)
                self.live = prompt.shape[1]
            with more_prefix(block, self.live):
                x = block(x, rope=rope, attn_mask=widen(attn_mask, prefix, self.live))
            yield x

    def prompt_of(self, index: int, tokens: Tensor) -> Tensor:
        """Return the prompts (B, p, D) of block `index` from its input (B, N, D)."""
        return self.prompt(index, len(tokens))


class PlainEvaVAPT(PlainEva):
    """VAPT's equations around timm's own blocks."""

    def __init__(self, model: nn.Module, method: Any, state: dict[str, Tensor]) -> None:
        self.experts = PlainVAPT(model, method, state)
        self.model, self.trained = self.experts.model, self.experts.trained
        self.blocks, self.pool_prompts = list(range(len(model.blocks))), False

    def prompt_of(self, index: int, tokens: Tensor) -> Tensor:
        """Return the experts' prompts (B, p, D) of block `index` from its input (B, N, D)."""
        return self.experts.prompt(index, len(tokens), tokens)


class PlainEvaBaseline(PlainBaseline):
    """See `PlainBaseline`."""

    def features(self, image: Tensor, **attention: Any) -> Tensor:
        """Return the expected result of `forward_features`, (B, N, D)."""
        model = self.model
        x, tables = embedded(model, image)
        for index, (block, rope) in enumerate(zip(model.blocks, tables, strict=True)):
            name = f"blocks.{index}.adapter"
            if f"{name}.up.weight" not in self.trained:
                x = block(x, rope=rope, **attention)
                continue
            h = block.attn(block.norm1(x), rope=rope, **attention)
            x = x + (h if block.gamma_1 is None else h * block.gamma_1)
            h = block.mlp(block.norm2(x))
            h = h if block.gamma_2 is None else h * block.gamma_2
            x = x + h + self._linear(f"{name}.up", F.gelu(self._linear(f"{name}.down", h)))
        return model.norm(x)


def pair(base: nn.Module, method: Any, memory: str = "speed") -> tuple[Any, Any]:
    """Tune `base` in place; return it with its plain formulation of the same parameters."""
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    redraw_prompts(tuned)
    redraw_added(tuned)
    kind: Any = PlainEvaVAPT if isinstance(method, VAPT) else PlainEva
    if isinstance(method, Baseline):
        kind = PlainEvaBaseline
    return tuned, kind(untouched, method, tuned.state_dict())
