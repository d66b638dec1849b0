"""Attention of a batch in which every image belongs to another task, in several implementations.

    one_call_per_image  one call of `prompt_attention` per image, each with its own prompts
    gathered            each image's prompts copied before its keys and values, then fused attention
                        in plain PyTorch; padded to the largest number of prompts, and masked, where
                        the numbers differ
    vpt_fast            one launch that reads all prompts without copying them

Inference only: there are no gradients. The classifiers of such a batch are checked here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare.correctness import WORST, Check, Results, budget, largest_error
from bench.providers.models import OURS
from vpt_fast.ops.attention.operator import prompt_attention
from vpt_fast.ops.attention.ragged import bank_attention
from vpt_fast.ops.rowwise.grouped_heads import grouped_heads

ONE_BY_ONE, GATHERED = "one_call_per_image", "gathered"
BANK_PROVIDERS = (ONE_BY_ONE, GATHERED)
"""Providers that exist only for batches of many tasks."""


class BankInputs(NamedTuple):
    """Arguments of `bank_attention`, and the (row offset, count) of each image on the host."""

    tokens: Tensor
    cached: Tensor
    computed: Tensor
    offsets: Tensor
    counts: Tensor
    spans: tuple[tuple[int, int], ...]

    @property
    def max_prompts(self) -> int:
        """Largest number of prompts of an image."""
        return max(count for _, count in self.spans)

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return float(self.tokens.shape[-1] ** -0.5)

    def prompts(self, image: int) -> Tensor:
        """Return an image's prompts as a view (1, p, 2, H, d)."""
        offset, count = self.spans[image]
        pool, first = (self.computed, ~offset) if offset < 0 else (self.cached, offset)
        return pool[first : first + count].unsqueeze(0)


@dataclass(frozen=True)
class BankAttentionCase:
    """Shapes of one comparison; the defaults are those of ViT-B/16 at 224 pixels.

    Attributes:
        prompts: Prompts per task; the largest number if `mixed`.
        batch: Images, each of another task.
        tokens: Tokens per image.
        heads: Attention heads.
        head_dim: Channels per head.
        mixed: Whether the tasks differ in their number of prompts, some having none, and every
            third task's prompts are computed per call instead of cached.
        providers: Providers to compare.
    """

    prompts: int = 50
    batch: int = 64
    tokens: int = 197
    heads: int = 12
    head_dim: int = 64
    mixed: bool = False
    providers: tuple[str, ...] = (*BANK_PROVIDERS, OURS)

    def __str__(self) -> str:
        kind = "mixed" if self.mixed else "equal"
        return f"bank_attention-p{self.prompts}-{kind}-b{self.batch}-n{self.tokens}"

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return row offset and number of each image's prompts, `prompts` rows apart."""
        p = self.prompts
        if not self.mixed:
            return tuple((b * p, p) for b in range(self.batch))
        counts = [(p, 0, p // 3, 1)[b % 4] for b in range(self.batch)]
        return tuple((~(b * p) if b % 3 == 2 else b * p, n) for b, n in enumerate(counts))

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> BankInputs:
        """Return seeded tensors."""
        generator = torch.Generator().manual_seed(1)
        rows, spans = self.batch * self.prompts, self.spans()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        heads = self.heads, self.head_dim
        offsets, counts = (torch.tensor(n, device=device) for n in zip(*spans, strict=True))
        return BankInputs(
            draw(self.batch, self.tokens, 3, *heads), draw(rows, 2, *heads),
            draw(rows if self.mixed else 0, 2, *heads), offsets, counts, spans,
        )  # fmt: skip


def _one_by_one(given: BankInputs) -> Tensor:
    return torch.cat(
        [
            prompt_attention([given.tokens[b : b + 1]], [given.prompts(b)], given.scale)
            for b in range(len(given.spans))
        ]
    )


def _gathered(given: BankInputs) -> Tensor:
    tokens, cached, computed, offsets, counts, _ = given
    slots = torch.arange(given.max_prompts, device=tokens.device)
    pool, first = cached, offsets
    if len(computed):
        pool = torch.cat([cached, computed])
        first = torch.where(offsets < 0, len(cached) + ~offsets, offsets)
    rows = (first[:, None] + slots).clamp(max=len(pool) - 1)
    kv = torch.cat([pool[rows], tokens[:, :, 1:]], 1)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None
    if len({count for _, count in given.spans}) > 1:
        own = torch.ones(len(tokens), tokens.shape[1], dtype=torch.bool, device=tokens.device)
        mask = torch.cat([slots < counts[:, None], own], 1)[:, None, None]
    out = F.scaled_dot_product_attention(tokens[:, :, 0].transpose(1, 2), k, v, mask)
    return out.transpose(1, 2).flatten(2)


def _ours(given: BankInputs) -> Tensor:
    pools = given.cached, given.computed
    rows = given.offsets, given.counts
    return bank_attention([given.tokens], *pools, *rows, given.max_prompts, given.scale)[0]


IMPLEMENTATIONS: dict[str, Callable[[BankInputs], Tensor]] = {
    ONE_BY_ONE: _one_by_one,
    GATHERED: _gathered,
    OURS: _ours,
}


def _exact(given: BankInputs) -> Tensor:
    """Return the result in fp64, computed image by image from the formula."""
    outs = []
    for b in range(len(given.spans)):
        q, k, v = given.tokens[b : b + 1].double().unbind(2)
        prompt_k, prompt_v = given.prompts(b).double().unbind(2)
        k, v = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
        weights = (torch.einsum("bmhd,bnhd->bhmn", q, k) * given.scale).softmax(-1)
        outs.append(torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2))
    return torch.cat(outs)


def _run(implementation: Callable[[BankInputs], Tensor], given: BankInputs) -> Results:
    with torch.no_grad():
        return {"out": implementation(given)}


def functions(
    case: BankAttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Callable[[], Results]]:
    """Return the function to time, by provider."""
    return {
        name: partial(_run, IMPLEMENTATIONS[name], case.inputs(dtype, device))
        for name in case.providers
    }


def checks(
    case: BankAttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Check]:
    """Check every provider against fp64, as `bench.compare.correctness` does for models."""
    kind = str(dtype).removeprefix("torch.")
    given = case.inputs(dtype, device)
    wanted = {"out": _exact(given)}

    def error(name: str) -> tuple[float, str]:
        return largest_error({"out": IMPLEMENTATIONS[name](given).double()}, wanted)

    limit = budget(error(GATHERED)[0], kind)
    limits = {GATHERED: WORST[kind]}
    return {name: Check(name, *error(name), limits.get(name, limit)) for name in case.providers}


@dataclass(frozen=True)
class HeadsCase:
    """Classifiers of many tasks: images of `width` features, tasks with 0 to 30 classes."""

    width: int = 776
    batch: int = 7

    def __str__(self) -> str:
        return f"grouped_heads-f{self.width}"


def _heads(
    case: HeadsCase, dtype: torch.dtype, device: torch.device | str
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Return class counts by image, features, and the classifiers' weights and biases."""
    generator = torch.Generator().manual_seed(case.width)
    counts = [(13, 0, 1, 30)[b % 4] for b in range(case.batch)]
    rows = sum(counts)
    features, weight, bias = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((case.batch, case.width), (rows, case.width), (rows,))
    )
    return counts, features, weight, bias


def run_heads(case: HeadsCase, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return the logits of all classifiers, stored with the last image's first."""
    counts, features, weight, bias = _heads(case, dtype, device)
    sizes = torch.tensor(counts, device=device)
    logit_offsets = sizes.cumsum(0) - sizes
    rows = sum(counts)
    weight_offsets = rows - logit_offsets - sizes
    return grouped_heads(
        features, weight, bias, weight_offsets, sizes, logit_offsets, rows, max(counts)
    )


def check_heads(case: HeadsCase, dtype: torch.dtype, device: torch.device | str) -> Check:
    """Check the classifiers against one matrix product per image."""
    counts, features, weight, bias = _heads(case, dtype, device)

    def plain(kind: torch.dtype) -> Results:
        x, *head = (t.to(kind) for t in (features, weight, bias))
        w, b = (t.split(counts[::-1])[::-1] for t in head)
        logits = [F.linear(*one) for one in zip(x, w, b, strict=True)]
        return {"logits": torch.cat(logits).double()}

    ours = run_heads(case, dtype, device).double()
    truth = plain(torch.float64)
    limit = budget(largest_error(plain(dtype), truth)[0], str(dtype).removeprefix("torch."))
    error, worst = largest_error({"logits": ours}, truth)
    return Check(OURS, error, worst, limit)
