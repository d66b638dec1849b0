"""What a fused block computes with: the same operations as kernels, in PyTorch, or as operators.

Every implementation of an operation takes and returns the same. Which one a tensor gets:

    operators of PyTorch's   where somebody traces (`tracing`)
    the Triton kernels       on a GPU, called as functions, their launches planned once per layout
    the references           anywhere else, called as functions
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import Tensor

from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.ops.attention import operator as attention_ops
from vpt_fast.ops.attention import reference as attention_reference
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.experts import operator as expert_ops
from vpt_fast.ops.experts import reference as prompt_expert_reference
from vpt_fast.ops.experts import token_mixing as mix_ops
from vpt_fast.ops.rowwise import activation as activation_ops
from vpt_fast.ops.rowwise import residual_norm as norm_ops
from vpt_fast.ops.rowwise import residual_norm_reference
from vpt_fast.ops.tracing import is_traced
from vpt_fast.ops.window_attention import operator as window_ops
from vpt_fast.ops.window_attention import reference as window_reference

_MOST_LAYOUTS = 256
"""Layouts of blocks that are remembered, of all models together."""

Function = Callable[..., Any]

REFERENCES: dict[str, Function] = {
    "residual_norm": residual_norm_reference.residual_norm,
    "residual_norm_backward": residual_norm_reference.residual_norm_backward,
    "attention": attention_reference.attention_forward,
    "attention_backward": attention_reference.attention_backward,
    "window_attention": window_reference.window_attention_forward,
    "window_attention_backward": window_reference.window_attention_backward,
    "activation": activation_ops.activate,
    "activation_backward": activation_ops.activate_backward,
    "fold": prompt_expert_reference.fold_forward,
    "fold_backward": prompt_expert_reference.fold_backward,
    "mix": prompt_expert_reference.mix_forward,
    "mix_backward": prompt_expert_reference.mix_backward,
    "features": prompt_expert_reference.features_forward,
    "features_backward": prompt_expert_reference.features_backward,
}


@functools.cache
def kernels() -> dict[str, Function]:
    """The kernels by operation; each takes a `launch` besides."""
    from vpt_fast.kernels.attention import launches as attention
    from vpt_fast.kernels.experts import launches as prompt_expert
    from vpt_fast.kernels.rowwise import activation, residual_norm
    from vpt_fast.kernels.window_attention import launches as windows

    return {
        "residual_norm": residual_norm.residual_norm,
        "residual_norm_backward": residual_norm.residual_norm_backward,
        "attention": attention.attention_forward,
        "attention_backward": attention.attention_backward,
        "window_attention": windows.window_attention_forward,
        "window_attention_backward": windows.window_attention_backward,
        "activation": activation.activation,
        "activation_backward": activation.activation_backward,
        "fold": prompt_expert.fold_forward,
        "fold_backward": prompt_expert.fold_backward,
        "mix": prompt_expert.mix_forward,
        "mix_backward": prompt_expert.mix_backward,
        "features": prompt_expert.features_forward,
        "features_backward": prompt_expert.features_backward,
    }


def implementation(operation: str, tensor: Tensor) -> Function:
    """What computes an operation on `tensor`, where nobody traces: its kernels or its reference."""
    return (kernels() if uses_kernels(tensor) else REFERENCES)[operation]


# --- the operators, with the arguments and results of the functions --------------------------


def _residual_norm(residual: Tensor, branch: Tensor | None, *others: Any) -> Any:
    total, y, statistics = norm_ops.residual_norm(residual, branch, *others)
    return residual if branch is None else total, y, statistics


def _attention_backward(
    tokens: list[Tensor], prompts: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor]]:
    grads = attention_ops.attention_operator_backward(tokens, prompts, *others)
    count = len(tokens) if others[-2] else 0
    return grads[:count], grads[count:]


def _window_attention(*arguments: Any) -> Any:
    *tensors, window, shift, scale = arguments
    return window_ops.window_attention_operator(*tensors, list(window), list(shift), scale)


def _window_attention_backward(*arguments: Any) -> Any:
    *tensors, window, shift, scale, tokens, prompts, table = arguments
    grads = window_ops.window_attention_operator_backward(
        *tensors, list(window), list(shift), scale, tokens, prompts, table, False
    )
    found, asked = iter(grads), (tokens, prompts and tensors[3] is not None, table)
    return *[next(found) if wanted else None for wanted in asked], None


def _fold(weight: Tensor, kernel: Tensor, grid: tuple[int, int], padded: int) -> Any:
    return expert_ops.fold_operator(weight, kernel, *grid, padded)


def _fold_backward(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, grid: tuple[int, int]
) -> Any:
    return expert_ops.fold_operator_backward(weight, kernel, grad_mix, grad_sum, *grid)


def _features(inputs: FeatureInputs, *others: Any) -> Any:
    return expert_ops.features_operator(*inputs, *others)


def _features_backward(inputs: FeatureInputs, *others: Any) -> Any:
    return expert_ops.features_operator_backward(*inputs, *others)


OPERATORS: dict[str, Function] = {
    "residual_norm": _residual_norm,
    "residual_norm_backward": norm_ops.residual_norm_backward,
    "attention": attention_ops.attention_operator,
    "attention_backward": _attention_backward,
    "window_attention": _window_attention,
    "window_attention_backward": _window_attention_backward,
    "activation": activation_ops.activation,
    "activation_backward": activation_ops.activation_backward,
    "fold": _fold,
    "fold_backward": _fold_backward,
    "mix": mix_ops.mix_tokens,
    "mix_backward": mix_ops.mix_tokens_backward,
    "features": _features,
    "features_backward": _features_backward,
}


# --- sites -----------------------------------------------------------------------------------


class Sites(Protocol):
    """The implementation of each operation at each place of a block: `sites[operation, place]`.

    For kernels a place is where tensors always have the same layout, so that it has launches of
    its own; then all tensors must be contiguous.
    """

    def __getitem__(self, site: tuple[str, str], /) -> Function:
        """An implementation of the operation."""


class _Remembered(dict[tuple[str, str], Function]):
    """Sites that are made when they are first asked for.

    Args:
        functions: implementations by operation.
    """

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self._functions = functions

    def __missing__(self, site: tuple[str, str]) -> Function:
        function = self[site] = self._made(self._functions[site[0]])
        return function

    def _made(self, function: Function) -> Function:
        return function


class PlannedSites(_Remembered):
    """Sites of kernels, each with a launcher of its own."""

    def _made(self, function: Function) -> Function:
        from vpt_fast.kernels.runtime.launch_plan import Launcher

        return functools.partial(function, launch=Launcher())


class _Operators:
    """The operators, at every place: sites without a memory, which can be traced."""

    def __getitem__(self, site: tuple[str, str]) -> Function:
        return OPERATORS[site[0]]


OPERATOR_SITES: Sites = _Operators()
REFERENCE_SITES: Sites = _Remembered(REFERENCES)


@functools.lru_cache(maxsize=_MOST_LAYOUTS)
def _kernel_sites(*layout: Hashable) -> Sites:
    return PlannedSites(kernels())


def sites_for(x: Tensor, head_dim: int, *layout: Hashable) -> Sites:
    """The sites of a block whose input is x.

    Args:
        x: the block's input; its device and dtype decide.
        head_dim: channels of a head; the kernels take up to 128.
        layout: everything that the layouts of the block's tensors depend on.
    """
    if is_traced(x):
        return OPERATOR_SITES
    if uses_kernels(x) and head_dim <= attention_ops.MAX_HEAD_DIM:
        return _kernel_sites(head_dim, *layout)
    return REFERENCE_SITES
