"""VAPT's prompt experts of many tasks at once: every image with the weights of its own task.

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4, without dropout. Tasks with the same number of prompts and hidden channels are computed
together, in one batched product for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class BlockExperts(NamedTuple):
    """A task's experts in one block; fp32 at least."""

    matrix: Tensor  # (p, patches), convolution and token-wise projector folded
    mix_sum: Tensor  # (p,), its row sums
    weight: Tensor  # (D,), affine of the experts' LayerNorm
    shift: Tensor  # (D,)
    bias: Tensor  # (p,)


class TaskExperts(NamedTuple):
    """A task's experts in all blocks but the first; fp32 at least."""

    blocks: tuple[BlockExperts, ...]
    down: Tensor  # (r, D), the feature projector
    up: Tensor  # (D, r)
    grid: tuple[int, int]  # height and width of the patch grid
    residual: bool  # whether the mix is added to what the projector makes of it

    @property
    def num_prompts(self) -> int:
        """p."""
        return len(self.blocks[0].matrix)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.down, self.up, *(t for block in self.blocks for t in block)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What tasks that are computed together have in common."""
        return self.num_prompts, len(self.down), self.residual


@dataclass(frozen=True)
class ExpertGroup:
    """Images whose tasks' experts are computed together.

    Attributes:
        members: which of the batch's images, on the host.
        images: the same (n,).
        tasks: their tasks' experts, each task once.
        owner: (n,), which of `tasks` each image has; None if image i has task i.
        whole: the group is the whole batch, in its order.
    """

    members: tuple[int, ...]
    images: Tensor
    tasks: tuple[TaskExperts, ...]
    owner: Tensor | None
    whole: bool

    def prompts(self, x: Tensor, mean: Tensor, rstd: Tensor, block: int) -> Tensor:
        """Prompts (n, p, D) of the group's images, before norm1.

        Args:
            x: the block's input, of all images, (B, N, D); the patches are its last rows.
            mean: of every row, (B, N).
            rstd: reciprocal standard deviation of every row, with the experts' epsilon, (B, N).
            block: which block, at least 1.
        """
        experts = [task.blocks[block - 1] for task in self.tasks]
        matrix, mix_sum, weight, shift, bias = (
            self._of_images(parts) for parts in zip(*experts, strict=True)
        )
        down, up = (self._of_images([getattr(t, n) for t in self.tasks]) for n in ("down", "up"))
        patches = matrix.shape[2]
        rows, mean, rstd = (
            t if self.whole else t.index_select(0, self.images)
            for t in (x[:, -patches:], mean[:, -patches:], rstd[:, -patches:])
        )
        # The patches are not normalised in memory: the matrix is scaled, the means are taken off.
        scaled = matrix * rstd[:, None]  # (n, p, patches)
        mixed = torch.baddbmm(-(scaled @ mean[..., None]), scaled, rows.to(scaled.dtype))
        mixed = mixed.mul_(weight[:, None]).add_(bias[..., None])
        mixed = mixed.addcmul_(mix_sum[..., None], shift[:, None])  # g, (n, p, D)
        hidden = torch.bmm(mixed, down.mT).relu_()
        if self.tasks[0].residual:
            return torch.baddbmm(mixed, hidden, up.mT)
        return torch.bmm(hidden, up.mT)

    def _of_images(self, parts: Sequence[Tensor]) -> Tensor:
        """A tensor of each task as one of each image, (n, ...)."""
        if len(parts) == 1:
            return parts[0].expand(len(self.images), *parts[0].shape)
        every = torch.stack(list(parts))
        return every if self.owner is None else every.index_select(0, self.owner)


def expert_groups(
    experts: Sequence[TaskExperts | None], device: torch.device
) -> tuple[ExpertGroup, ...]:
    """Images whose tasks have experts, in groups.

    Args:
        experts: of every image's task; None for a task without.
        device: where the groups' indices are needed.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for image, task in enumerate(experts):
        if task is not None:
            groups.setdefault(task.kind, []).append(image)
    found = []
    for images in groups.values():
        tasks: list[TaskExperts] = []
        at: dict[int, int] = {}
        owner = []
        for image in images:
            task = experts[image]
            if task is not None:
                if id(task) not in at:
                    at[id(task)] = len(tasks)
                    tasks.append(task)
                owner.append(at[id(task)])
        apart = len(tasks) == len(images) or len(tasks) == 1
        found.append(
            ExpertGroup(
                tuple(images),
                torch.tensor(images, device=device),
                tuple(tasks),
                None if apart else torch.tensor(owner, device=device),
                whole=len(images) == len(experts),
            )
        )
    return tuple(found)
