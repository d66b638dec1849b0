"""An operation and its implementations; which of them computes is decided here only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vpt_fast.ops.backend import uses_kernels

Function = Callable[..., Any]


@dataclass(eq=False)
class Operation:
    """One operation; all of its implementations take and return the same.

    Attributes:
        name: Name, unique among operations; key of its kernel in `kernels`.
        kernels: Function that imports Triton, which is not everywhere, and returns kernels by name.
            Each takes a `launch` besides.
        reference: Implementation in PyTorch, for any device and dtype.
        operator: Implementation as a PyTorch operator, which can be traced.
        reuses_output: Whether the kernel takes `out`, an earlier result that it writes over.
    """

    name: str
    kernels: Callable[[], dict[str, Function]]
    reference: Function
    operator: Function
    reuses_output: bool = False

    @property
    def kernel(self) -> Function:
        """The kernel's launch as a function."""
        return self.kernels()[self.name]

    def on(self, tensor: Tensor, head_dim: int = 0) -> Function:
        """Return what computes on a tensor outside of tracing: the kernel or the reference.

        Args:
            tensor: Input whose device and dtype decide.
            head_dim: Channels of a head, for operations on heads.
        """
        return self.kernel if uses_kernels(tensor, head_dim) else self.reference
