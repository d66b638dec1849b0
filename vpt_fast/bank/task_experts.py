"""VAPT's prompt experts of many tasks at once, each image with the weights of its own task.

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

from vpt_fast.bank.task_modules import ModuleGroup, TaskModules


class ExpertTensors(NamedTuple):
    """Tensors of the prompt experts in the L blocks after the first; at least fp32.

    Where several tasks or images share a tensor, they are its second dimension.
    """

    matrix: Tensor  # (L, p, patches), convolution and token-wise projector folded
    mixing_sum: Tensor  # (L, p), row sums of `matrix`
    norm_weight: Tensor  # (L, D), affine of the experts' LayerNorms
    norm_bias: Tensor  # (L, D)
    bias: Tensor  # (L, p), bias of the token-wise projector
    down: Tensor  # (1, r, D), the feature projector, the same for all blocks
    up: Tensor  # (1, D, r)


@dataclass(frozen=True)
class TaskExperts:
    """Prompt experts of a task.

    Attributes:
        tensors: Tensors of all blocks but the first.
        grid: Height and width of the patch grid.
        residual: Whether g is added to the output of the feature projector.
    """

    tensors: ExpertTensors
    grid: tuple[int, int]
    residual: bool

    @property
    def num_prompts(self) -> int:
        """Number p of prompts."""
        return self.tensors.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Key that tasks have in common if they are computed together."""
        return self.num_prompts, self.tensors.down.shape[1], self.residual


@dataclass(frozen=True)
class ExpertGroup:
    """Images whose prompt experts are computed together.

    Attributes:
        members: Indices of the images in the batch, on the host.
        images: The same indices (n,), on the device.
        tensors: Experts of the images' tasks, (L, n, ...); 1 in place of n if all have one task.
        num_prompts: Number p of prompts.
        residual: Whether g is added to the output of the feature projector.
        whole: Whether the group is the whole batch, in its order.
    """

    members: tuple[int, ...]
    images: Tensor
    tensors: ExpertTensors
    num_prompts: int
    residual: bool
    whole: bool

    def count(self, block: int) -> int:
        """Return the number of keys that each image gets in a block."""
        return self.num_prompts if block else 0

    def prompts(self, x: Tensor, mean: Tensor, rstd: Tensor, block: int) -> Tensor:
        """Return the prompts (n, p, D) of the group's images, before norm1.

        Args:
            x: Input of the block for the whole batch, (B, N, D); the patches are its last rows.
            mean: Mean of every row, (B, N).
            rstd: Reciprocal standard deviation of every row, with the experts' epsilon, (B, N).
            block: Index of the block, at least 1.
        """
        tensors, layer = self.tensors, block - 1
        matrix, mixing_sum = tensors.matrix[layer], tensors.mixing_sum[layer]
        weight, norm_bias = tensors.norm_weight[layer], tensors.norm_bias[layer]
        bias, patches = tensors.bias[layer], matrix.shape[2]
        down, up = (t[0].expand(len(self.images), -1, -1) for t in (tensors.down, tensors.up))
        rows, mean, rstd = (
            t if self.whole else t.index_select(0, self.images)
            for t in (x[:, -patches:], mean[:, -patches:], rstd[:, -patches:])
        )
        # Scaling the matrix and subtracting the means saves writing normalised patches.
        scaled = matrix * rstd[:, None]  # (n, p, patches)
        g = torch.baddbmm(-(scaled @ mean[..., None]), scaled, rows.to(scaled.dtype))
        g = g.mul_(weight[:, None]).add_(bias[..., None])
        g = g.addcmul_(mixing_sum[..., None], norm_bias[:, None])  # (n, p, D)
        hidden = torch.bmm(g, down.mT).relu_()
        if self.residual:
            return torch.baddbmm(g, hidden, up.mT)
        return torch.bmm(hidden, up.mT)


def expert_groups(
    experts: Sequence[TaskExperts | TaskModules | None], device: torch.device
) -> tuple[ExpertGroup | ModuleGroup, ...]:
    """Return the images whose tasks compute prompts, in groups that are computed together.

    Args:
        experts: Experts or modules of each image's task; None for a task without them.
        device: Device of the groups' indices.

    Returns:
        Groups of prompt experts, then those of modules.
    """
    groups: dict[tuple[int, int, bool], list[int]] = {}
    others: dict[int, list[int]] = {}
    tasks: dict[int, TaskModules] = {}
    for image, task in enumerate(experts):
        if isinstance(task, TaskExperts):
            groups.setdefault(task.kind, []).append(image)
        elif task is not None:
            tasks[id(task)] = task
            others.setdefault(id(task), []).append(image)
    own = [
        ModuleGroup(
            tuple(images), torch.tensor(images, device=device), tasks[key],
            whole=len(images) == len(experts),
        )
        for key, images in others.items()
    ]  # fmt: skip
    return (*(_group(images, experts, device) for images in groups.values()), *own)


def _group(
    images: Sequence[int],
    experts: Sequence[TaskExperts | TaskModules | None],
    device: torch.device,
) -> ExpertGroup:
    tasks: dict[int, TaskExperts] = {}
    owner = []
    for image in images:
        task = experts[image]
        if isinstance(task, TaskExperts):
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
