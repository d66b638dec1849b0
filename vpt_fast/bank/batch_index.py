"""Where each image of a batch finds the prompts and the head of its task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_fast.bank.memory import Resident, State
from vpt_fast.bank.row_pool import Extent, RowPool
from vpt_fast.bank.task_experts import ExpertGroup, expert_groups
from vpt_fast.bank.task_modules import ModuleGroup


@dataclass(frozen=True)
class BatchIndex:
    """Row offsets of the prompts and heads of one batch.

    Attributes:
        prompt_kv: Cached prompt keys and values (rows, 2, H, d).
        row_offsets: (blocks, B), row of an image's first prompt in `prompt_kv`; ~row in the prompts
            that experts compute in the call.
        counts: (blocks, B), number of an image's prompts.
        max_counts: Largest of the counts in each block.
        groups: Images whose prompts are computed in the call, in the order of those prompts.
        head_weight: (rows, F).
        head_bias: (rows,).
        heads: (3, B): first row of an image's head, its number of rows, and the sum of the numbers
            of rows of the images before it.
        classes: Number of classes of each image's task, on the host.
    """

    prompt_kv: Tensor
    row_offsets: Tensor
    counts: Tensor
    max_counts: tuple[int, ...]
    groups: tuple[ExpertGroup | ModuleGroup, ...]
    head_weight: Tensor
    head_bias: Tensor
    heads: Tensor
    classes: list[int]


def index_batch(
    state: State, residents: Sequence[Resident], depth: int, dtype: torch.dtype
) -> BatchIndex:
    """Return the row offsets of a batch's prompts and heads.

    Args:
        state: State of the bank.
        residents: Task of each image.
        depth: Number of blocks.
        dtype: Dtype in which prompt keys and values and heads are needed; if it is not that of the
            pools, the rows of the batch's tasks are copied.
    """
    prompt_kv, kv_offsets = _in_dtype(state.prompt_kv, [r.prompt_kv for r in residents], dtype)
    heads, head_offsets = _in_dtype(state.heads, [r.heads for r in residents], dtype)
    device = prompt_kv[0].device
    _share_with_stream((*prompt_kv, *heads), residents)
    groups = expert_groups([r.experts for r in residents], device)
    offsets, counts = [], []
    for block in range(depth):
        row, number, offset = [0] * len(residents), [0] * len(residents), 0
        for group in groups:
            for image in group.members:
                row[image], number[image] = ~offset, group.count(block)
                offset += number[image]
        for image, resident in enumerate(residents):
            if block in resident.blocks:
                first, number[image] = resident.blocks[block]
                row[image] = kv_offsets[image] + first
        offsets.append(row)
        counts.append(number)
    classes = [r.heads.count for r in residents]
    before = [0, *itertools.accumulate(classes[:-1])]
    # One copy to the device, before anything of the call is queued there.
    every = torch.tensor([*offsets, *counts, head_offsets, classes, before], device=device)
    return BatchIndex(
        prompt_kv[0],
        every[:depth],
        every[depth : 2 * depth],
        tuple(map(max, counts)),
        groups,
        heads[0],
        heads[1],
        every[2 * depth :],
        classes,
    )


def _in_dtype(
    pool: RowPool, extents: Sequence[Extent], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Return tensors that hold the extents' rows in `dtype`, and each extent's offset there."""
    if pool.tensors[0].dtype == dtype:
        return pool.tensors, [extent.start for extent in extents]
    distinct = {id(extent): extent for extent in extents}
    offsets, offset = {}, 0
    for key, extent in distinct.items():
        offsets[key] = offset
        offset += extent.count
    parts = zip(*(pool.read(extent) for extent in distinct.values()), strict=True)
    tensors = tuple(torch.cat(rows).to(dtype) for rows in parts)
    return tensors, [offsets[id(extent)] for extent in extents]


def _share_with_stream(tensors: Sequence[Tensor], residents: Sequence[Resident]) -> None:
    """Keep the allocator from reusing memory that this call's stream may still read."""
    if not tensors[0].is_cuda:
        return
    stream = torch.cuda.current_stream(tensors[0].device)
    experts = {id(r.experts): r.experts for r in residents if r.experts is not None}
    for tensor in (*tensors, *(t for e in experts.values() for t in e.tensors)):
        tensor.record_stream(stream)
