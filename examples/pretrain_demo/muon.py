"""Muon in single precision, for pretraining on a CPU.

timm has Muon too, but computes it in bfloat16, which is tens of times slower than float32 on
processors without bfloat16 instructions. The orthogonalisation here is timm's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn

_COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised (K. Jordan et al., 2024, "Muon").

    Each step moves a matrix W (out, in) along the nearest orthogonal matrix to its Nesterov
    momentum, times `lr * sqrt(max(1, out / in))`. A matrix with `out == 3 * in`, as in a packed
    qkv projection, is taken as three square ones. Weight decay is decoupled.

    Args:
        params: Parameters to train, which must be matrices.
        lr: Step size; 0.02 is the usual one.
        momentum: Momentum of the running mean of gradients.
        weight_decay: Fraction of W taken away per step, times `lr`.

    Raises:
        ValueError: If a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        params = list(params)
        for parameter in params:
            if parameter.ndim != 2:
                raise ValueError(
                    f"Muon takes matrices, not a tensor of shape {tuple(parameter.shape)}; "
                    "give it to AdamW"
                )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every matrix that has a gradient, and return the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(mean, group["momentum"])
                rows, columns = weight.shape
                if rows == 3 * columns:
                    update, rows = update.view(3, columns, columns), columns
                update = zeropower_via_newtonschulz(update, 5, _COEFFICIENTS, dtype=torch.float32)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                weight.add_(update.reshape(weight.shape).to(weight.dtype), alpha=-size)
        return loss
