"""Who trains the prompts: the same model and method, computed in the ways that are compared.

    published              concatenation, explicit softmax, fp32: the published formulation
    concat                 concatenation, fused attention
    concat_compiled        the same under torch.compile
    keys_concat            prompts' keys and values concatenated in plain PyTorch, fused attention
    keys_concat_compiled   the same under torch.compile
    vpt_fast               ours
    without_prompts        the same frozen model without prompts, the gradient through all blocks

On a GPU also, beside the order in which PyTorch itself chooses among its kernels for attention:

    concat_cudnn, keys_concat_cudnn                cuDNN's attention wherever it can be taken
    vpt_fast_compiled, without_prompts_compiled    the two under torch.compile

All of them take images (B, 3, height, width) to logits, and start from the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.providers.keys_concat import ConcatenatedKeys
from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.models.tuned import blocks_of
from vpt_fast.reference.swin import ConcatenatedWindows
from vpt_fast.reference.vit import (
    ConcatenatedExperts,
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
"""Compiled providers, and what they compile."""

CUDNN = {"concat_cudnn": "concat", "keys_concat_cudnn": "keys_concat"}
"""Providers that prefer cuDNN's attention, and what they run with it."""

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

PROVIDERS = (
    PUBLISHED, "concat", "concat_compiled", "keys_concat", "keys_concat_compiled", OURS, WITHOUT,
)  # fmt: skip
"""Those that are compared everywhere."""

EAGER = tuple(name for name in PROVIDERS if name not in COMPILED)
GPU_EAGER = (PUBLISHED, "concat", *CUDNN, "keys_concat", OURS, WITHOUT)
GPU_PROVIDERS = (*GPU_EAGER, *COMPILED)


def base(name: str) -> str:
    """The provider that computes the same in eager PyTorch, with PyTorch's own order of kernels."""
    return COMPILED.get(name) or CUDNN.get(name, name)


class PreferCudnn(nn.Module):
    """A module whose attention is cuDNN's wherever that can be taken.

    The backward pass is by the kernel that the forward pass chose.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, height, width)."""
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return self.inner(images)


def provide(name: str, model: Any, method: VPTDeep | VAPT, memory: str = "speed") -> nn.Module:
    """A plain timm vision transformer as provider `name` trains it.

    Args:
        name: one of `GPU_PROVIDERS`.
        model: changed in place: frozen, its head trained. "published" makes it fp32. A
            SwinTransformer has no "keys_concat".
        method: VPTDeep with prompts in every block, or VAPT. With 0 prompts the gradient still
            flows through all blocks, as it does "without_prompts".
        memory: mode of ours, one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.

    Returns:
        A module that maps images to logits, in training mode.

    Raises:
        ValueError: an unknown name, or one that the model does not have.
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
        tuned = ConcatenatedKeys(tuned)
    return tuned.train() if method.num_prompts else tuned


def trained(module: nn.Module) -> dict[str, tuple[Any, int | None]]:
    """What a provider trains, by the names that adapters use.

    Returns:
        Name to a parameter and the index in it, None for the whole: eager PyTorch keeps the
        prompts of all blocks in one.
    """
    inner: Any = getattr(module, "_orig_mod", module)
    inner = inner.inner if isinstance(inner, PreferCudnn) else inner
    inner = inner.source if isinstance(inner, ConcatenatedKeys) else inner
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
    owner = getattr(inner, "model", inner)
    for name, value in owner.named_parameters():
        if value.requires_grad:
            found[name] = value, None
    return found


def values(module: nn.Module) -> dict[str, Tensor]:
    """Values of what a provider trains, by name."""
    return {
        name: (parameter if row is None else parameter[row]).detach().clone()
        for name, (parameter, row) in trained(module).items()
    }


def set_values(module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    """Give what a provider trains the values of those names; others stay as they are."""
    with torch.no_grad():
        for name, (parameter, row) in trained(module).items():
            if name in wanted:
                (parameter if row is None else parameter[row]).copy_(wanted[name])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of what a provider trains, by name.

    Raises:
        RuntimeError: one is missing.
    """
    found = {}
    for name, (parameter, row) in trained(module).items():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        found[name] = parameter.grad if row is None else parameter.grad[row]
    return found
