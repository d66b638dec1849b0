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


class ExpertTensors(NamedTuple):
    """Prompt experts of all blocks but the first; fp32 at least.

    L blocks, in the second dimension tasks or images where there are several.
    """

    matrix: Tensor  # (L, p, patches), convolution and token-wise projector folded
    mix_sum: Tensor  # (L, p), its row sums
    weight: Tensor  # (L, D), affine of the experts' LayerNorms
    shift: Tensor  # (L, D)
    bias: Tensor  # (L, p)
    down: Tensor  # (1, r, D), the feature projector, the same for all blocks
    up: Tensor  # (1, D, r)


@dataclass(frozen=True)
class TaskExperts:
    """A task's prompt experts.

    Attributes:
        tensors: of all blocks but the first.
        grid: height and width of the patch grid.
        residual: whether the mix is added to what the projector makes of it.
    """

    tensors: ExpertTensors
    grid: tuple[int, int]
    residual: bool

    @property
    def num_prompts(self) -> int:
        """p."""
        return self.tensors.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What tasks that are computed together have in common."""
        return self.num_prompts, self.tensors.down.shape[1], self.residual


@dataclass(frozen=True)
class ExpertGroup:
    """Images whose tasks' experts are computed together.

    Attributes:
        members: which of the batch's images, on the host.
        images: the same (n,).
        tensors: their tasks' experts, (L, n, ...); 1 in place of n where they have one task.
        num_prompts: p.
        residual: as of their tasks.
        whole: the group is the whole batch, in its order.
    """

    members: tuple[int, ...]
    images: Tensor
    tensors: ExpertTensors
    num_prompts: int
    residual: bool
    whole: bool

    def prompts(self, x: Tensor, mean: Tensor, rstd: Tensor, block: int) -> Tensor:
        """Prompts (n, p, D) of the group's images, before norm1.

        Args:
            x: the block's input, of all images, (B, N, D); the patches are its last rows.
            mean: of every row, (B, N).
            rstd: reciprocal standard deviation of every row, with the experts' epsilon, (B, N).
            block: which block, at least 1.
        """
        matrix, mix_sum, weight, shift, bias = (t[block - 1] for t in self.tensors[:5])
        down, up = (t[0].expand(len(self.images), -1, -1) for t in self.tensors[5:])
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
        if self.residual:
            return torch.baddbmm(mixed, hidden, up.mT)
        return torch.bmm(hidden, up.mT)


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
    return tuple(_group(images, experts, device) for images in groups.values())


def _group(
    images: Sequence[int], experts: Sequence[TaskExperts | None], device: torch.device
) -> ExpertGroup:
    tasks: dict[int, TaskExperts] = {}
    owner = []
    for image in images:
        task = experts[image]
        if task is not None:
            tasks.setdefault(id(task), task)
            owner.append(id(task))
    at = {key: index for index, key in enumerate(tasks)}
    first = next(iter(tasks.values()))
    tensors = ExpertTensors(*(t.unsqueeze(1) for t in first.tensors))
    if len(tasks) > 1:
        every = zip(*(task.tensors for task in tasks.values()), strict=True)
        tensors = ExpertTensors(*(torch.stack(parts, 1) for parts in every))
    if 1 < len(tasks) < len(images):
        rows = torch.tensor([at[key] for key in owner], device=device)
        tensors = ExpertTensors(*(t.index_select(1, rows) for t in tensors))
    return ExpertGroup(
        tuple(images), torch.tensor(images, device=device), tensors, first.num_prompts,
        first.residual, whole=len(images) == len(experts),
    )  # fmt: skip
