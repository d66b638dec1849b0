"""Attention of a batch whose images are of as many tasks, in the ways that are compared.

    one_call_per_image  `prompt_attention` of one image after the other, each with its own prompts
    gathered            each image's prompts copied beside its keys, fused attention in plain
                        PyTorch; padded to the most prompts, and masked, where their numbers differ
    vpt_fast            one launch that reads all prompts where they are

Inference: there are no gradients. The classifiers of such a batch are checked here too.
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
OWN_NAMES = (ONE_BY_ONE, GATHERED)
"""Providers that only batches of many tasks have."""


class Given(NamedTuple):
    """Arguments of `bank_attention`, and each image's (start, count) on the host."""

    tokens: Tensor
    rest: Tensor
    made: Tensor
    starts: Tensor
    counts: Tensor
    spans: tuple[tuple[int, int], ...]

    @property
    def most(self) -> int:
        return max(count for _, count in self.spans)

    @property
    def scale(self) -> float:
        return float(self.tokens.shape[-1] ** -0.5)

    def prompts(self, image: int) -> Tensor:
        """(1, p, 2, H, d), a view."""
        start, count = self.spans[image]
        pool, first = (self.made, ~start) if start < 0 else (self.rest, start)
        return pool[first : first + count].unsqueeze(0)


@dataclass(frozen=True)
class BankAttentionCase:
    """Shapes of one comparison; the defaults are those of ViT-B/16 at 224 pixels.

    Attributes:
        prompts: of each task; of the task with the most where they are `mixed`.
        batch: images, each of a task of its own.
        mixed: whether tasks have other numbers of prompts, none among them, and every third has
            prompts that were made for the batch.
    """

    prompts: int = 50
    batch: int = 64
    tokens: int = 197
    heads: int = 12
    head_dim: int = 64
    mixed: bool = False
    providers: tuple[str, ...] = (*OWN_NAMES, OURS)

    def __str__(self) -> str:
        kind = "mixed" if self.mixed else "equal"
        return f"bank_attention-p{self.prompts}-{kind}-b{self.batch}-n{self.tokens}"

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and number of each image's prompts, `prompts` rows apart."""
        p = self.prompts
        if not self.mixed:
            return tuple((b * p, p) for b in range(self.batch))
        counts = [(p, 0, p // 3, 1)[b % 4] for b in range(self.batch)]
        return tuple((~(b * p) if b % 3 == 2 else b * p, n) for b, n in enumerate(counts))

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Given:
        """Seeded tensors."""
        generator = torch.Generator().manual_seed(1)
        rows, spans = self.batch * self.prompts, self.spans()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        heads = self.heads, self.head_dim
        starts, counts = (torch.tensor(n, device=device) for n in zip(*spans, strict=True))
        return Given(
            draw(self.batch, self.tokens, 3, *heads), draw(rows, 2, *heads),
            draw(rows if self.mixed else 0, 2, *heads), starts, counts, spans,
        )  # fmt: skip


def _one_by_one(given: Given) -> Tensor:
    return torch.cat(
        [
            prompt_attention([given.tokens[b : b + 1]], [given.prompts(b)], given.scale)
            for b in range(len(given.spans))
        ]
    )


def _gathered(given: Given) -> Tensor:
    tokens, rest, made, starts, counts, _ = given
    slots = torch.arange(given.most, device=tokens.device)
    pool, first = rest, starts
    if len(made):
        pool, first = torch.cat([rest, made]), torch.where(starts < 0, len(rest) + ~starts, starts)
    rows = (first[:, None] + slots).clamp(max=len(pool) - 1)
    keys = torch.cat([pool[rows], tokens[:, :, 1:]], 1)
    k, v = keys.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None
    if len({count for _, count in given.spans}) > 1:
        own = torch.ones(len(tokens), tokens.shape[1], dtype=torch.bool, device=tokens.device)
        mask = torch.cat([slots < counts[:, None], own], 1)[:, None, None]
    out = F.scaled_dot_product_attention(tokens[:, :, 0].transpose(1, 2), k, v, mask)
    return out.transpose(1, 2).flatten(2)


def _ours(given: Given) -> Tensor:
    pools = given.rest, given.made
    places = given.starts, given.counts
    return bank_attention([given.tokens], *pools, *places, given.most, given.scale)[0]


WAYS: dict[str, Callable[[Given], Tensor]] = {
    ONE_BY_ONE: _one_by_one,
    GATHERED: _gathered,
    OURS: _ours,
}


def _exact(given: Given) -> Tensor:
    """Image by image in fp64, written out."""
    outs = []
    for b in range(len(given.spans)):
        q, k, v = given.tokens[b : b + 1].double().unbind(2)
        prompt_k, prompt_v = given.prompts(b).double().unbind(2)
        k, v = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
        weights = (torch.einsum("bmhd,bnhd->bhmn", q, k) * given.scale).softmax(-1)
        outs.append(torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2))
    return torch.cat(outs)


def _run(way: Callable[[Given], Tensor], given: Given) -> Results:
    with torch.no_grad():
        return {"out": way(given)}


def functions(
    case: BankAttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Callable[[], Results]]:
    """What is timed, by provider."""
    return {name: partial(_run, WAYS[name], case.inputs(dtype, device)) for name in case.providers}


def checks(
    case: BankAttentionCase, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Check]:
    """Every provider against fp64, as `bench.compare.correctness` does it."""
    kind = str(dtype).removeprefix("torch.")
    given = case.inputs(dtype, device)
    wanted = {"out": _exact(given)}

    def error(name: str) -> tuple[float, str]:
        return largest_error({"out": WAYS[name](given).double()}, wanted)

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
    """Classes of each image's task, features, and the classifiers' weights and biases."""
    generator = torch.Generator().manual_seed(case.width)
    counts = [(13, 0, 1, 30)[b % 4] for b in range(case.batch)]
    rows = sum(counts)
    features, weight, bias = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((case.batch, case.width), (rows, case.width), (rows,))
    )
    return counts, features, weight, bias


def run_heads(case: HeadsCase, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Logits of all classifiers; the last image's comes first among them."""
    counts, features, weight, bias = _heads(case, dtype, device)
    sizes = torch.tensor(counts, device=device)
    offsets = sizes.cumsum(0) - sizes
    rows = sum(counts)
    starts = rows - offsets - sizes
    return grouped_heads(features, weight, bias, starts, sizes, offsets, rows, max(counts))


def check_heads(case: HeadsCase, dtype: torch.dtype, device: torch.device | str) -> Check:
    """The classifiers' check, against a product for each image."""
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
