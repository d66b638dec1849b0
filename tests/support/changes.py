"""Edits of a model's parts as other libraries make them: LoRA layers, hooks, offloaded weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class LowRank(nn.Module):
    """A LoRA layer like PEFT's: it holds the Linear and exposes its weight and bias."""

    def __init__(self, base_layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base_layer
        like: Any = {"dtype": base_layer.weight.dtype}
        self.down = nn.Parameter(0.3 * torch.randn(rank, base_layer.in_features, **like))
        self.up = nn.Parameter(0.3 * torch.randn(base_layer.out_features, rank, **like))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Scaled(nn.Linear):
    """A Linear subclass whose output is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def swapped(model: nn.Module, make: Callable[[nn.Linear], nn.Module], names: Any = LINEARS) -> None:
    for block in blocks_of(model):
        for name in names:
            parent = block.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], make(block.get_submodule(name)))


def blocks_of(model: Any) -> list[Any]:
    layers = [model] if hasattr(model, "blocks") else model.layers
    return [block for layer in layers for block in layer.blocks]


def with_low_rank(model: nn.Module) -> None:
    torch.manual_seed(3)
    swapped(model, LowRank)


def merged(model: nn.Module) -> None:
    """Add the updates of `with_low_rank` to the weights of the Linears."""
    torch.manual_seed(3)

    def make(linear: nn.Linear) -> nn.Linear:
        low = LowRank(linear)
        with torch.no_grad():
            linear.weight += low.up @ low.down
        return linear.requires_grad_()

    swapped(model, make)


def changed(x: Tensor) -> Tensor:
    """Return x edited such that no norm cancels the edit."""
    return 1.25 * x + 0.5 * x.sin()


def changing(kind: str) -> Callable[[nn.Module], Any]:
    """Return a function that registers a row-wise hook which edits a module's input or output."""

    def register(module: nn.Module) -> Any:
        if kind == "before":
            return module.register_forward_pre_hook(lambda m, args: (changed(args[0]),))
        return module.register_forward_hook(lambda m, args, out: changed(out))

    return register


def lend_weights(model: nn.Module, kept: str = "-") -> None:
    """Move parameters to meta except during a module's call, as accelerate's cpu_offload does.

    Args:
        model: Model whose modules are changed.
        kept: Part of the names of modules that keep their parameters.
    """
    for name, module in model.named_modules():
        own = {leaf: value for leaf, value in module._parameters.items() if value is not None}
        if not own or kept in name:
            continue
        forward = module.forward

        def offload(module: Any = module, own: Any = own) -> None:
            for leaf, value in own.items():
                empty = torch.empty_like(value, device="meta")
                module._parameters[leaf] = nn.Parameter(empty, value.requires_grad)

        def lent(
            *args: Any, module: Any = module, own: Any = own, call: Any = forward,
            end: Any = offload, **more: Any,
        ) -> Any:  # fmt: skip
            module._parameters.update(own)
            try:
                return call(*args, **more)
            finally:
                end()

        module.forward = lent  # type: ignore[method-assign]
        offload()
