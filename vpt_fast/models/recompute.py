"""Activation checkpointing that reads the generator's state only if something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from vpt_fast.models.graphs.capture import CannotRecord, is_recording
from vpt_fast.models.prompt_buffers import modules_of_prompts, with_the_same_buffers
from vpt_fast.modules.baseline_layers import BottleneckAdapter
from vpt_fast.modules.experts import FeatureProjector, PromptExperts
from vpt_fast.modules.prompt_tokens import PromptTokens
from vpt_fast.ops.frozen import check_versions, versions_of
from vpt_fast.ops.tracing import is_transformed

# Modules that draw nothing in training either; their children are checked by themselves.
_QUIET = (
    nn.Identity,
    nn.Linear,
    nn.LayerNorm,
    nn.Conv2d,
    nn.GELU,
    nn.Sequential,
    BottleneckAdapter,
)


def in_mode(memory: str, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`: as it is in mode "speed", in others as `recomputed` does."""
    return function(*args) if memory == "speed" else recomputed(module, function, *args)


def recomputed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`; only the arguments are saved, and backward recomputes the rest.

    The generator's state is saved only if the function draws random numbers: it cannot be read
    while a CUDA graph is recorded.

    Args:
        module: Module that contains all modules which the function calls.
        function: Function to compute, and to recompute in backward.
        args: Arguments of the function.

    Raises:
        CannotRecord: A CUDA graph is being recorded, and the function draws random numbers.
        RuntimeError: In backward, if a weight below the module has changed since.
    """
    if is_transformed():
        return function(*args)  # torch.func has no hooks on saved tensors
    if not torch.compiler.is_compiling():
        function = with_the_same_buffers(module, function)
        if not is_recording():
            function = _of_the_same_weights(module, function)
    draws = any(_draws(part) for part in module.modules())
    if draws and is_recording():
        raise CannotRecord(
            "dropout is drawn in a block that is computed again in backward, which a recording "
            "cannot repeat; use memory='speed', or no dropout"
        )
    return checkpoint(function, *args, preserve_rng_state=draws)


def _of_the_same_weights(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; from its second call on it refuses weights other than at its first."""
    before: tuple[list[Tensor], list[int]] | None = None

    def checked(*args: Any) -> Any:
        nonlocal before
        # Inference tensors have no version; tensors on the meta device are replaced for a call.
        weights = [t for t in _weights(module) if not t.is_inference() and not t.is_meta]
        if before is None:
            before = weights, versions_of(weights)
            return function(*args)
        if [*map(id, weights)] != [*map(id, before[0])]:
            raise RuntimeError(
                "weights of a block were replaced between its forward pass and its backward pass, "
                "which computes with them again; replace them before the one or after the other"
            )
        check_versions(*before)
        return function(*args)

    return checked


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield what must not change until backward: weights, those that prompt modules share, and
    buffers, but for those of prompts, which may count or average."""
    prompts = modules_of_prompts(module)
    own = {id(buffer) for part in prompts for buffer in part.buffers()}
    for part in (module, *prompts):  # what blocks share is below none of them
        yield from part.parameters()
    yield from (buffer for buffer in module.buffers() if id(buffer) not in own)


def _draws(module: Any) -> bool:
    """Return whether a module draws random numbers; unknown ones are assumed to in training."""
    if isinstance(module, PromptExperts):
        projector = module._owner[0].prompt_projector
        drops = module.training and module.channel_dropout
        return bool(drops or (projector.training and projector.dropout))
    if not module.training or isinstance(module, _QUIET):
        return False
    if isinstance(module, _DropoutNd):
        return bool(module.p)
    if isinstance(module, DropPath):
        return bool(module.drop_prob)
    if isinstance(module, PromptTokens | FeatureProjector):
        return bool(module.dropout)
    return True
