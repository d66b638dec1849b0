"""Checks of the row-wise operators on a device: inputs, the operators, and their plain formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from bench.compare.correctness import Results
from vpt_fast.ops.rowwise.activation import activation, activation_backward
from vpt_fast.ops.rowwise.gated_activation import gated, gated_backward
from vpt_fast.ops.rowwise.residual_norm import residual_norm, residual_norm_backward
from vpt_fast.ops.rowwise.rotation import rotate

EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    """Residual sum and LayerNorm of (2, rows, width), forward and backward."""

    width: int
    rows: int = 13
    layer_scale: bool = True

    def __str__(self) -> str:
        return f"residual_norm-d{self.width}" + "-layer_scale" * self.layer_scale


@dataclass(frozen=True)
class ActivationCase:
    """Bias and activation of (2, rows, width), forward and backward."""

    kind: str
    width: int = 776
    rows: int = 13

    def __str__(self) -> str:
        return f"activation-{self.kind}-c{self.width}"


@dataclass(frozen=True)
class GatedCase:
    """Gated activation of (2, rows, 2 width), forward and backward."""

    kind: str = "silu"
    width: int = 520
    rows: int = 13

    def __str__(self) -> str:
        return f"gated-{self.kind}-c{self.width}"


@dataclass(frozen=True)
class RotationCase:
    """Rotation of queries and keys of (2, rows, 3, 3, width), forward and backward."""

    half: bool = True
    width: int = 64
    rows: int = 70

    def __str__(self) -> str:
        return f"rotation-{'half' if self.half else 'interleaved'}-d{self.width}"


RowCase = NormCase | ActivationCase | GatedCase | RotationCase
Functions = tuple[Callable[..., Results], Callable[..., Results]]


def row_functions(case: RowCase) -> Functions:
    """Return the operators of a case, and the plain formulas, as functions of `row_inputs`."""
    if isinstance(case, NormCase):
        return _norm, _plain_norm
    if isinstance(case, ActivationCase):
        return _activations(case)
    return _gated(case) if isinstance(case, GatedCase) else _rotations(case)


def row_inputs(case: RowCase) -> Iterable[Tensor]:
    """Return the tensors of a case, fp32."""
    generator = torch.Generator().manual_seed(case.width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (2, case.rows, case.width)
    if isinstance(case, ActivationCase):
        return draw(*shape), draw(case.width), draw(*shape)
    if isinstance(case, GatedCase):
        return draw(*shape[:-1], 2 * case.width), draw(case.width), draw(case.width), draw(*shape)
    if isinstance(case, RotationCase):
        heads = (2, case.rows, 3, 3, case.width)
        return draw(*heads), draw(case.rows - 5, 2 * case.width), draw(*heads)
    scale = draw(case.width) if case.layer_scale else torch.ones(case.width)
    return (draw(*shape), draw(*shape), scale, 1 + 0.3 * draw(case.width),
            draw(case.width), draw(*shape), draw(*shape))  # fmt: skip


def _norm(
    residual: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor,
    grad_sum: Tensor,
) -> Results:  # fmt: skip
    total, y, statistics = residual_norm(
        residual, branch, scale, weight, bias, EPS, None, residual.dtype
    )
    grad_x, grad_branch = residual_norm_backward(
        total, statistics, weight, scale, grad_y, grad_sum, branch.dtype
    )
    return {"sum": total, "norm": y, "grad_sum": grad_x, "grad_branch": grad_branch}


def _plain_norm(
    residual: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor,
    grad_sum: Tensor,
) -> Results:  # fmt: skip
    total = (residual + scale * branch).requires_grad_()
    y = F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
    (grad,) = torch.autograd.grad([y, total.clone()], total, [grad_y, grad_sum])
    return {
        "sum": total.detach(), "norm": y.detach(), "grad_sum": grad, "grad_branch": scale * grad,
    }  # fmt: skip


_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": F.silu,
}


def _activations(case: ActivationCase) -> tuple[Callable[..., Results], Callable[..., Results]]:
    formula = _FORMULAS[case.kind]

    def ours(h: Tensor, bias: Tensor, grad: Tensor) -> Results:
        out, grad = activation(h, bias, case.kind), grad.clone()
        activation_backward(h, bias, grad, case.kind)
        return {"out": out, "grad": grad}

    def plain(h: Tensor, bias: Tensor, grad: Tensor) -> Results:
        h = (h + bias).requires_grad_()
        out = formula(h)
        return {"out": out.detach(), "grad": torch.autograd.grad(out, h, grad)[0]}

    return ours, plain


def _gated(case: GatedCase) -> Functions:
    formula = _FORMULAS[case.kind]

    def ours(h: Tensor, gate_bias: Tensor, value_bias: Tensor, grad: Tensor) -> Results:
        given = h, gate_bias, value_bias
        out = gated(*given, case.kind, False)
        return {"out": out, "grad": gated_backward(*given, grad, case.kind, False)}

    def plain(h: Tensor, gate_bias: Tensor, value_bias: Tensor, grad: Tensor) -> Results:
        h = h.clone().requires_grad_()
        gate, value = h.chunk(2, -1)
        out = formula(gate + gate_bias) * (value + value_bias)
        return {"out": out.detach(), "grad": torch.autograd.grad(out, h, grad)[0]}

    return ours, plain


def _rotations(case: RotationCase) -> Functions:
    def ours(heads: Tensor, table: Tensor, grad: Tensor) -> Results:
        wide: Any = table.to(torch.promote_types(table.dtype, torch.float32))
        heads, grad = heads.clone(), grad.clone()
        rotate(heads, wide, 2, case.half, False)
        rotate(grad, wide, 2, case.half, True)
        return {"out": heads, "grad": grad}

    def plain(heads: Tensor, table: Tensor, grad: Tensor) -> Results:
        heads = heads.clone().requires_grad_()
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        first = heads.shape[1] - table.shape[0]
        qk = heads[:, first:, :2].permute(0, 2, 3, 1, 4)
        rotated = apply_rot_embed_cat(qk, wide, half=case.half).permute(0, 3, 1, 2, 4)
        last = torch.cat([rotated, heads[:, first:, 2:]], 2)
        out = torch.cat([heads[:, :first], last], 1)
        return {"out": out.detach(), "grad": torch.autograd.grad(out, heads, grad)[0]}

    return ours, plain
