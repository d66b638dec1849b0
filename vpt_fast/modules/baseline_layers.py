"""Modules that baselines add to a model: bottleneck adapters and hidden layers of an MLP head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BottleneckAdapter(nn.Module):
    """Bottleneck adapter, h + up(gelu(down(h))) for the output h (B, N, D) of a block's MLP.

    `down.weight` has nn.Linear's default initialisation, all other parameters start at zero. So the
    adapter starts as the identity, and `up` has a gradient from the first step on.

    Args:
        width: Number D of channels of h.
        hidden_dim: Number of channels of the bottleneck.
        like: Tensor with the device and dtype of the parameters.
    """

    def __init__(self, width: int, hidden_dim: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden_dim, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(hidden_dim, width, device=like.device, dtype=like.dtype)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        """Return the adapted h, (B, N, D) -> (B, N, D)."""
        return h + self.up(F.gelu(self.down(h)))


def new_hidden_layers(width: int, hidden_dim: int, count: int, like: Tensor) -> nn.Sequential:
    """Return `count` Linears, each followed by a ReLU: (..., width) -> (..., hidden_dim).

    Weights are kaiming-normal over fan-in, which preserves the variance through ReLU; biases are 0.
    """
    layers: list[nn.Module] = []
    for index in range(count):
        inputs = hidden_dim if index else width
        linear = nn.Linear(inputs, hidden_dim, device=like.device, dtype=like.dtype)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def new_classifier(inputs: int, like: nn.Linear) -> nn.Linear:
    """Return a Linear with `inputs` inputs and the outputs and bias of `like`.

    Its weight is kaiming-normal over fan-out.
    """
    head = nn.Linear(
        inputs,
        like.out_features,
        bias=like.bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
    if like.bias is not None:
        head.bias.data.copy_(like.bias.detach())
    return head
