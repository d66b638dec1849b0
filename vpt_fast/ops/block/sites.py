"""Call sites of a block's operations, and what computes there, chosen once per layout.

PyTorch operators   under tracing
Triton kernels      on a GPU, called as functions, with launches planned once per layout
references          anywhere else, called as functions
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Protocol

from torch import Tensor

from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.tracing import is_traced

_MOST_LAYOUTS = 256
"""Number of layouts of blocks that are cached, of all models together."""


class Sites(Protocol):
    """Implementations by call site of a block: `sites[operation, site]`.

    At a call site tensors always have the same layout, so that a kernel has one launch plan there;
    all tensors must be contiguous then.
    """

    def __getitem__(self, site: tuple[Operation, str], /) -> Function:
        """Return an implementation of the operation."""


class ReferenceSites(dict[tuple[Operation, str], Function]):
    """Call sites of the references."""

    def __missing__(self, site: tuple[Operation, str]) -> Function:
        function = self[site] = self.implementation(site[0])
        return function

    def implementation(self, operation: Operation) -> Function:
        """Return what computes an operation at one call site."""
        return operation.reference


class PlannedSites(ReferenceSites):
    """Call sites of the kernels, each with a launcher of its own."""

    def implementation(self, operation: Operation) -> Function:
        """Return the kernel, with a launcher that nothing else has."""
        from vpt_fast.kernels.runtime.launch_plan import Launcher

        return functools.partial(operation.kernel, launch=Launcher())


class _Operators:
    """Call sites of the operators: no dictionary, whose changes would be traced."""

    def __getitem__(self, site: tuple[Operation, str]) -> Function:
        return site[0].operator


OPERATOR_SITES: Sites = _Operators()
REFERENCE_SITES: Sites = ReferenceSites()


@functools.lru_cache(maxsize=_MOST_LAYOUTS)
def planned_sites(*layout: Hashable) -> Sites:
    """Return the kernels' call sites for blocks of one layout."""
    return PlannedSites()


def sites_for(x: Tensor, head_dim: int, *layout: Hashable) -> Sites:
    """Return the call sites of a block.

    Args:
        x: Input of the block; its device and dtype decide.
        head_dim: Channels of a head.
        layout: All that the layouts of the block's tensors depend on.
    """
    if is_traced(x):
        return OPERATOR_SITES
    return planned_sites(head_dim, *layout) if uses_kernels(x, head_dim) else REFERENCE_SITES
