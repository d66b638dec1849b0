"""Frozen blocks without a backward pass: results of all blocks of one layout share memory.

A block's results are dead once the next block has read them, and it writes over them: norms,
attention, activation and Linears allocate for the first block of a layout only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.sites import PlannedSites, Sites
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.rowwise.activation import ACTIVATION


def run_forward(
    blocks: Sequence[BlockSteps],
    residual: Tensor,
    branch: Tensor | None,
    sources: Sequence[tuple[Tensor | None, ...]],
) -> tuple[Tensor, Any]:
    """Return what `vpt_fast.ops.block.function.run_blocks` does, without saving anything."""
    shared: _ReusingSites | None = None
    for steps, own in zip(blocks, sources, strict=True):
        if isinstance(steps.sites, PlannedSites):
            if shared is None or shared.sites is not steps.sites:
                shared = _ReusingSites(steps.sites)
            steps = _ReusingSteps(steps, shared)
        residual, branch, _ = steps.forward(residual, branch, own)
    return residual, branch


class _LinearResult(NamedTuple):
    """Input (rows, in) and result (rows, out) of a Linear, and the result in the input's shape."""

    rows: Tensor
    result_rows: Tensor
    result: Tensor


class _ReusingSites(dict[tuple[Operation, str], Function]):
    """Call sites whose results share memory, for blocks of one layout, one call and one stream.

    Attributes:
        sites: Call sites of the kernels.
        linears: Result of each Linear by name.
    """

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.linears: dict[str, _LinearResult] = {}

    def __missing__(self, site: tuple[Operation, str]) -> Function:
        operation, _ = site
        function: Function
        if operation is ACTIVATION:
            function = functools.partial(self.sites[operation, "in place"], in_place=True)
        elif operation.reuses_output:
            function = _overwriting(self.sites[site])
        else:
            function = self.sites[site]
        self[site] = function
        return function


def _overwriting(function: Function) -> Function:
    last: Any = None

    def write(*arguments: Any) -> Any:
        nonlocal last
        last = function(*arguments, out=last)
        return last

    return write


class _ReusingSteps(BlockSteps):
    """Steps of a block with results in shared memory."""

    __slots__ = ("_results",)

    def __init__(self, steps: BlockSteps, shared: _ReusingSites) -> None:
        self._take(steps, shared)
        self._results = shared.linears

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = self._results.get(name)
        if known is None or known.rows.data_ptr() != x.data_ptr():
            result = F.linear(x, weight, bias)
            # The views keep the memory alive, so that the address stays the input's.
            rows, result_rows = x.view(-1, x.shape[-1]), result.view(-1, result.shape[-1])
            self._results[name] = _LinearResult(rows, result_rows, result)
            return result
        transposed = self.transposed.get(name)
        if transposed is None:
            transposed = self.transposed[name] = weight.t()
        if bias is None:
            torch.mm(known.rows, transposed, out=known.result_rows)
        else:
            torch.addmm(bias, known.rows, transposed, out=known.result_rows)
        return known.result
