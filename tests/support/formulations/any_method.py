"""Prompt methods of every form that the interface knows, and their plain formulation.

The plain formulation computes each block's prompts by the method's own module, from a plain model's
rows. Prompts are concatenated into the sequence of timm's own blocks, keys and values into what
timm hands to PyTorch's attention.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.formulations.isotropic import first_input, through
from support.formulations.plain import Plain, redraw_prompts, widen
from vpt_fast import BlockInfo, PromptMethod, PromptModule, Prompts, prompt_tune, register_method

KINDS = (
    "rows", "kv", "both", "counts", "after", "tokens", "tokens kv", "tokens both", "feature",
    "feature kv", "per image and shared",
)  # fmt: skip


@dataclass(frozen=True)
class AnyMethod(PromptMethod):
    """Prompts of one of the `KINDS`, in all blocks or in those of `blocks`."""

    kind: str = "rows"
    blocks: tuple[int, ...] | None = None

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return the prompted blocks."""
        return tuple(range(depth)) if self.blocks is None else self.blocks


class Shared(nn.Module):
    """Feature of an image: a nonlinear function of the mean of its rows."""

    def __init__(self, method: AnyMethod, block: BlockInfo) -> None:
        super().__init__()
        self.linear = nn.Linear(block.width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1)).tanh()


class _Module(PromptModule):
    def __init__(self, method: AnyMethod, block: BlockInfo) -> None:
        super().__init__()
        self.kind, (p, n) = method.kind, (method.num_prompts, method.num_prompts + 1)
        heads = (block.num_heads, block.head_dim)
        if self.kind == "counts":
            p = 1 + block.index % 3
        self.tokens = block.new_parameter(p, block.width)
        self.keys, self.values = (nn.Parameter(torch.randn(n, *heads)) for _ in range(2))
        self.of_rows = nn.Linear(block.width, block.width)
        self.of_feature = nn.Linear(6, block.width)
        self.of_heads = nn.Linear(6, n * block.num_heads * block.head_dim)
        self.register_buffer("mixing", torch.randn(p, p))
        used = {
            "rows": "tokens", "counts": "tokens", "after": "tokens", "kv": "keys values",
            "both": "tokens keys values", "tokens": "tokens of_rows", "tokens kv": "keys values",
            "tokens both": "tokens of_rows keys values", "feature": "tokens of_feature",
            "feature kv": "of_heads values", "per image and shared": "tokens keys values of_rows",
        }[self.kind].split()  # fmt: skip
        for name in ("tokens", "keys", "values", "of_rows", "of_feature", "of_heads"):
            if name not in used:
                delattr(self, name)
        if self.kind != "after":
            del self.mixing


class Static(_Module):
    def forward(self) -> Any:
        if self.kind == "kv":
            return Prompts(keys=self.keys, values=self.values)
        if self.kind == "both":
            return Prompts(self.tokens.tanh(), self.keys * 2, self.values)
        return self.tokens.sin()

    def after_dropout(self, rows: Tensor) -> Tensor:
        return self.mixing @ rows.square() if self.kind == "after" else rows


class OfTokens(_Module):
    reads = "tokens"

    def forward(self, x: Tensor) -> Any:
        factor = x.mean((1, 2)).tanh()
        if self.kind == "per image and shared":
            rows = self.tokens + self.of_rows(x.mean(1)).unsqueeze(1)
            return Prompts(rows, self.keys, self.values)
        keys = values = rows = None
        if "kv" in self.kind or "both" in self.kind:
            keys, values = (t * factor[:, None, None, None] for t in (self.keys, self.values))
        if "kv" not in self.kind:
            rows = self.tokens * self.of_rows(x.mean(1)).tanh().unsqueeze(1)
        return rows if keys is None else Prompts(rows, keys, values)

    def regulariser(self) -> Tensor:
        return self.tokens.square().mean() if self.kind == "tokens" else self.values.abs().mean()


class OfFeature(_Module):
    reads = "feature"

    def forward(self, feature: Tensor) -> Any:
        if self.kind == "feature":
            return self.tokens * self.of_feature(feature).unsqueeze(1)
        keys = self.of_heads(feature).view(len(feature), *self.values.shape)
        return Prompts(keys=keys, values=keys * self.values)


@register_method("any-method", AnyMethod, Shared)
def new_module(method: AnyMethod, block: BlockInfo) -> PromptModule:
    """Return the module of a block."""
    first = method.kind.split()[0]
    kind = {"tokens": OfTokens, "per": OfTokens, "feature": OfFeature}.get(first, Static)
    return kind(method, block)


@contextlib.contextmanager
def more_keys(kv: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Return a context in which PyTorch's attention also reads keys and values (B, n, H, d)."""
    attention = F.scaled_dot_product_attention

    def with_more(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Any:
        own = [t.transpose(1, 2).expand(len(q), -1, -1, -1) for t in kv or ()]
        k, v = (torch.cat([more, t], 2) for more, t in zip(own, (k, v), strict=True))
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (own[0].shape[2], 0), value=attn_mask.dtype == torch.bool)
        return attention(q, k, v, attn_mask, **options)

    if kv is None:
        yield
        return
    F.scaled_dot_product_attention = with_more
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


class PlainAnyMethod(Plain):
    """See `Plain`; `modules` are copies of the tuned model's."""

    def __init__(self, model: Any, method: AnyMethod, tuned: Any) -> None:
        self.model, self.method = model.requires_grad_(False).eval(), method
        self.pool_prompts, self.training = False, False
        self.blocks = list(method.prompted_blocks(len(model.blocks)))
        copied = copy.deepcopy(tuned)
        self.shared = copied._modules.get("prompt_shared")
        self.modules = {i: copied.blocks[i].prompt for i in self.blocks}
        state = tuned.state_dict()
        every = dict(copied.named_parameters())
        reads = method.kind.startswith("feature")
        self.trained = {
            name: every[name].requires_grad_()
            for name in every
            if ".prompt." in name or (name.startswith("prompt_shared") and reads)
        }
        for name, parameter in self.model.named_parameters():
            if name.startswith(("head.", "head_dist.")):
                parameter.data.copy_(state[name])
                self.trained[name] = parameter.requires_grad_()

    def made(self, index: int, x: Tensor, feature: Any) -> tuple[Any, Any]:
        """Return rows (B, p, D) and a pair of keys and values of a block's input, or None each."""
        module = self.modules[index]
        inputs = {"nothing": (), "tokens": (x,), "feature": (feature,)}[module.reads]
        made = module.forward(*inputs)
        rows, keys, values = made if isinstance(made, Prompts) else (made, None, None)
        if rows is not None:
            rows = rows if rows.ndim == 3 else rows.expand(len(x), -1, -1)
            rows = F.dropout(rows, self.method.dropout, self.training)
            rows = module.after_dropout(rows)
        if keys is None:
            return rows, None
        pair = [t if t.ndim == 4 else t.expand(len(x), -1, -1, -1) for t in (keys, values)]
        both = F.dropout(torch.stack(pair, 2), self.method.dropout, self.training)
        return rows, both.unbind(2)

    def sequence(self, image: Tensor, attn_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, prefix + prompts + patches, D) after each block, and set `self.live`."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x, tables = first_input(model, image)
        feature = None if self.shared is None else self.shared(x)
        self.live = 0
        for index, (block, rope) in enumerate(zip(model.blocks, tables, strict=True)):
            kv = None
            if index in self.blocks:
                tokens = torch.cat([x[:, :prefix], x[:, prefix + self.live :]], dim=1)
                rows, kv = self.made(index, tokens, feature)
                rows = tokens[:, :0] if rows is None else rows
                x = torch.cat([tokens[:, :prefix], rows, tokens[:, prefix:]], dim=1)
                self.live = rows.shape[1]
            mask = widen(attn_mask, prefix, self.live)
            with more_keys(kv):
                x = through(block, x, rope, self.live, mask)
            yield x


def pair(base: Any, method: AnyMethod, memory: str = "speed") -> tuple[Any, PlainAnyMethod]:
    """Tune `base` in place; return it with its plain formulation (same prompts, same head)."""
    untouched = copy.deepcopy(base)
    tuned = prompt_tune(base, method, memory=memory)
    redraw_prompts(tuned)
    for name, parameter in tuned.named_parameters():
        if "prompt_shared" in name and not method.kind.startswith("feature"):
            parameter.requires_grad_(False)
    return tuned, PlainAnyMethod(untouched, method, tuned)
