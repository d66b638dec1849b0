"""A model with prompts, in the implementations that are compared.

    published              concatenation, explicit softmax, fp32: the published formulation
    concat                 concatenation, fused attention
    concat_compiled        the same under torch.compile
    keys_concat            prompts' keys and values concatenated in plain PyTorch, fused attention
    keys_concat_compiled   the same under torch.compile
    vpt_fast               this package
    without_prompts        the frozen model without prompts, the gradient through all blocks

On a GPU there are more. PyTorch chooses its attention kernel in the providers above, and in these:

    concat_cudnn, keys_concat_cudnn                cuDNN's attention wherever it is supported
    vpt_fast_compiled, without_prompts_compiled    the two under torch.compile

All providers map images (B, 3, height, width) to logits and start from the same parameter values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.providers.keys_concat import ConcatenatedKV
from vpt_fast import PromptMethod, prompt_tune
from vpt_fast.models.tuned import blocks_of
from vpt_fast.reference.swin import ConcatenatedWindows
from vpt_fast.reference.vit import (
    ConcatenatedExperts,
    ConcatenatedMethod,
    ConcatenatedPrompts,
    concatenated,
    require_gradient,
    without_prompts,
)

OURS = "vpt_fast"
PUBLISHED = "published"
WITHOUT = "without_prompts"
COMPILED = {
    "concat_compiled": "concat",
    "keys_concat_compiled": "keys_concat",
    f"{OURS}_compiled": OURS,
    f"{WITHOUT}_compiled": WITHOUT,
}
"""Compiled providers, and the provider that each compiles."""

CUDNN = {"concat_cudnn": "concat", "keys_concat_cudnn": "keys_concat"}
"""Providers that prefer cuDNN's attention, and the provider that each runs with it."""

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

PROVIDERS = (
    PUBLISHED, "concat", "concat_compiled", "keys_concat", "keys_concat_compiled", OURS, WITHOUT,
)  # fmt: skip
"""Providers that are compared on every device."""

EAGER = tuple(name for name in PROVIDERS if name not in COMPILED)
GPU_EAGER = (PUBLISHED, "concat", *CUDNN, "keys_concat", OURS, WITHOUT)
GPU_PROVIDERS = (*GPU_EAGER, *COMPILED)


def base(name: str) -> str:
    """Return the eager provider that computes the same result.

    It leaves the choice of the attention kernel to PyTorch.
    """
    return COMPILED.get(name) or CUDNN.get(name, name)


class PreferCudnn(nn.Module):
    """A module that uses cuDNN's attention wherever it is supported.

    The backward pass uses the kernel that the forward pass chose.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return self.inner(images)


def provide(name: str, model: Any, method: PromptMethod, memory: str = "speed") -> nn.Module:
    """Return a plain timm vision transformer as provider `name` trains it.

    Args:
        name: One of `GPU_PROVIDERS`.
        model: Model to change in place: it is frozen, except for its head. "published" converts it
            to fp32. "keys_concat" does not support a SwinTransformer.
        method: VPTDeep with prompts in every block, VAPT, or for "concat" and "vpt_fast" any other.
            With 0 prompts the gradient still flows through all blocks, as it does for
            "without_prompts".
        memory: Memory mode of vpt_fast, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.

    Returns:
        A module that maps images to logits, in training mode.

    Raises:
        ValueError: If the name is unknown, or the provider does not support the model.
    """
    if name not in GPU_PROVIDERS:
        raise ValueError(f"provider is {name!r}; choose one of {', '.join(GPU_PROVIDERS)}")
    if name in COMPILED:
        module: Any = torch.compile(provide(COMPILED[name], model, method, memory), dynamic=False)
        return module
    if name in CUDNN:
        return PreferCudnn(provide(CUDNN[name], model, method))
    if name == PUBLISHED and next(model.parameters()).dtype != torch.float32:
        model = model.float()
    if name == WITHOUT:
        return without_prompts(model)
    if name == "keys_concat" and not hasattr(model, "blocks"):
        raise ValueError(f"keys_concat is for models without stages, not {type(model).__name__}")
    ours = name == OURS
    tuned: Any = prompt_tune(model, method, memory) if ours else concatenated(model, method)
    if name == PUBLISHED:
        for block in blocks_of(model):
            block.attn.fused_attn = False
    if not method.num_prompts:
        require_gradient(model, 0)
    elif name == "keys_concat":
        tuned = ConcatenatedKV(tuned)
    return tuned.train() if method.num_prompts else tuned


def trained(module: nn.Module) -> dict[str, tuple[Any, int | None]]:
    """Return what a provider trains, under the names that adapters use.

    Returns:
        A dict of name to a parameter and an index into it, None for the whole parameter: eager
        PyTorch stores the prompts of all blocks in one parameter.
    """
    inner: Any = getattr(module, "_orig_mod", module)
    inner = inner.inner if isinstance(inner, PreferCudnn) else inner
    inner = inner.source if isinstance(inner, ConcatenatedKV) else inner
    found: dict[str, tuple[Any, int | None]] = {}
    if isinstance(inner, ConcatenatedPrompts):
        for row, block in enumerate(inner.blocks):
            found[f"blocks.{block}.prompt.tokens"] = inner.prompts, row
    elif isinstance(inner, ConcatenatedWindows):
        names = [
            f"layers.{stage}.blocks.{block}.prompt.tokens"
            for stage, layer in enumerate(inner.model.layers)
            for block in range(len(layer.blocks))
        ]
        found = {names[i]: (p, None) for i, p in zip(inner.blocks, inner.prompts, strict=True)}
    elif isinstance(inner, ConcatenatedExperts):
        found["blocks.0.prompt.tokens"] = inner.tokens, None
        for kind, modules in (("norm", inner.norms), ("conv", inner.convs), ("mix", inner.mixes)):
            for index, part in enumerate(modules, 1):
                for name, value in part.named_parameters():
                    found[f"blocks.{index}.prompt.{kind}.{name}"] = value, None
        found["prompt_projector.down.weight"] = inner.down.weight, None
        found["prompt_projector.up.weight"] = inner.up.weight, None
    elif isinstance(inner, ConcatenatedMethod):
        for part, kind in ((inner.prompts, "prompt"), (inner.updates, "prompt_update")):
            for name, value in part.named_parameters():
                where, _, leaf = name.partition(".")
                found[f"blocks.{where}.{kind}.{leaf}"] = value, None
    owner = getattr(inner, "model", inner)
    for name, value in owner.named_parameters():
        if value.requires_grad:
            found[name] = value, None
    return found


def values(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of what a provider trains, by name."""
    return {
        name: (parameter if row is None else parameter[row]).detach().clone()
        for name, (parameter, row) in trained(module).items()
    }


def set_values(module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    """Set what a provider trains to the values of the same name; leave the rest unchanged."""
    with torch.no_grad():
        for name, (parameter, row) in trained(module).items():
            if name in wanted:
                (parameter if row is None else parameter[row]).copy_(wanted[name])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of what a provider trains, by name.

    Raises:
        RuntimeError: If a gradient is missing.
    """
    found = {}
    for name, (parameter, row) in trained(module).items():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        found[name] = parameter.grad if row is None else parameter.grad[row]
    return found
