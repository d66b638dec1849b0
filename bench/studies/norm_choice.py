"""Error and bytes of the ways to pass a block's LayerNorm on to the next matrix product.

    python -m bench.studies.norm_choice

The LayerNorm's affine folds into a frozen Linear, Wg = diag(gamma) W, b' = b + beta W, and with s
the column sums of Wg, LayerNorm(x) W + b = rstd * (x Wg - mean * s) + b'. Instead of writing the
normalised row, a pass may therefore multiply x itself and correct the product where it is read.

Errors are measured here, on the CPU, against fp64: the norm of the difference over the norm of the
result, all operands in bf16, products summed in fp32. Bytes are counted from the dataflow. No time
was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
OFFSETS = (0.0, 1.0, 5.0, 50.0)
"""Common offsets of a row's channels, in standard deviations."""

MASSIVE = "massive"
INPUTS = (*OFFSETS, MASSIVE)


class Problem(NamedTuple):
    """Rows x (N, D), and a frozen LayerNorm followed by a frozen Linear (D, O), all bf16."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    weight: Tensor  # (D, O)
    bias: Tensor


def problem(name: float | str, rows: int = 512, width: int = 768, seed: int = 0) -> Problem:
    """Return random rows and weights.

    Args:
        name: Common offset of the rows, or `MASSIVE` for a few channels 1,000 times the others.
        rows: Number of rows N.
        width: Channels D.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = values(rows, width)
    if isinstance(name, str):
        x[:, 3::256] *= 1000
    else:
        x += name
    tensors = (
        x, 1 + 0.3 * values(width), 0.1 * values(width), values(width, width) / width**0.5,
        0.1 * values(width),
    )  # fmt: skip
    return Problem(*(t.bfloat16() for t in tensors))


def _rounded(value: Tensor) -> Tensor:
    """Return fp32 values after a round trip through bf16."""
    return value.bfloat16().float()


class _Folded(NamedTuple):
    """What the implementations that fold the affine share, fp32."""

    x: Tensor
    mean: Tensor  # (N, 1)
    rstd: Tensor
    weight: Tensor  # Wg, stored as bf16
    sums: Tensor  # s, of Wg as it is stored
    bias: Tensor  # b'


def _folded(p: Problem) -> _Folded:
    x = p.x.float()
    mean, weight = x.mean(1, keepdim=True), _rounded(p.gamma.float()[:, None] * p.weight.float())
    rstd = (x.var(1, correction=0, keepdim=True) + EPS).rsqrt()
    bias = p.bias.float() + p.beta.float() @ p.weight.float()
    return _Folded(x, mean, rstd, weight, weight.sum(0), bias)


def exact(p: Problem) -> Tensor:
    """Return the result in fp64."""
    x, gamma, beta, weight, bias = (t.double() for t in p)
    return F.layer_norm(x, x.shape[1:], gamma, beta, EPS) @ weight + bias


def eager(p: Problem) -> Tensor:
    """Return the result of PyTorch's LayerNorm and Linear in bf16."""
    return F.linear(F.layer_norm(p.x, p.x.shape[1:], p.gamma, p.beta, EPS), p.weight.T, p.bias)


def row(p: Problem) -> Tensor:
    """Write the normalised row, affine applied, in bf16, as this package does."""
    y = F.layer_norm(p.x.float(), p.x.shape[1:], p.gamma.float(), p.beta.float(), EPS)
    return (_rounded(y) @ p.weight.float() + p.bias.float()).bfloat16()


def row_folded(p: Problem) -> Tensor:
    """Write the normalised row without affine in bf16."""
    f = _folded(p)
    return (_rounded((f.x - f.mean) * f.rstd) @ f.weight + f.bias).bfloat16()


def rank_one_bf16(p: Problem) -> Tensor:
    """Multiply x itself; store the product in bf16 and correct it where it is read."""
    f = _folded(p)
    return (f.rstd * (_rounded(f.x @ f.weight) - f.mean * f.sums) + f.bias).bfloat16()


def rank_one_fp32(p: Problem) -> Tensor:
    """Multiply x itself; correct the product in fp32, in its epilogue or stored as fp32."""
    f = _folded(p)
    return (f.rstd * (f.x @ f.weight - f.mean * f.sums) + f.bias).bfloat16()


def centred(p: Problem) -> Tensor:
    """Write the centred row in bf16; store its product in bf16 and scale it where it is read."""
    f = _folded(p)
    return (f.rstd * _rounded(_rounded(f.x - f.mean) @ f.weight) + f.bias).bfloat16()


IMPLEMENTATIONS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "row": row,
    "row, affine folded": row_folded,
    "rank one, bf16 product": rank_one_bf16,
    "rank one, fp32 product": rank_one_fp32,
    "centred row": centred,
}
CHOSEN = "row"


def errors(rows: int = 512, width: int = 768) -> dict[str, dict[float | str, float]]:
    """Return the error of every implementation for every input, against fp64."""
    result: dict[str, dict[float | str, float]] = {name: {} for name in IMPLEMENTATIONS}
    for kind in INPUTS:
        p = problem(kind, rows, width)
        right = exact(p)
        for name, implementation in IMPLEMENTATIONS.items():
            result[name][kind] = float((implementation(p).double() - right).norm() / right.norm())
    return result


# Rows of D channels that a pass reads and writes per token. The hidden layer has 4 D channels.
_PRODUCTS = {"qkv": (1, 3), "attention": (3, 1), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
_SUMS = ("sum, norm1", "sum, norm2")

DATAFLOW: dict[str, dict[str, tuple[int, int]]] = {
    "eager": {
        **_PRODUCTS,
        **dict.fromkeys(("sum 1", "sum 2"), (2, 1)),
        **dict.fromkeys(("norm1", "norm2"), (1, 1)),
        "activation": (4, 4),
    },
    "row": {**_PRODUCTS, **dict.fromkeys(_SUMS, (2, 2)), "activation": (4, 4)},
    "rank one, for norm2 only": {
        **_PRODUCTS, "sum, norm1": (2, 2), "sum, norm2": (2, 1), "activation": (4, 4),
    },
    "rank one, pass over qkv": {
        **_PRODUCTS, **dict.fromkeys(_SUMS, (2, 1)), "activation": (4, 4), "correction": (3, 3),
    },
    "rank one, inside attention": {
        **_PRODUCTS, **dict.fromkeys(_SUMS, (2, 1)), "activation": (4, 4),
    },
}  # fmt: skip
"""Passes of a block's forward with what they read and write; row statistics (8 bytes) are left out.
The correction of fc1's product is part of the activation's pass.
"""


def rows_moved(choice: str) -> int:
    """Return the rows of D channels that a token moves through memory in one block, forward."""
    return sum(sum(reads_writes) for reads_writes in DATAFLOW[choice].values())


def main() -> None:
    """Print both tables."""
    print("Relative error against fp64, measured on the CPU: bf16, 512 rows of 768 channels\n")
    heads = [name if isinstance(name, str) else f"offset {name:g}" for name in INPUTS]
    print(f"{'':26}" + "".join(f"{head:>12}" for head in heads))
    for name, found in errors().items():
        print(f"{name:26}" + "".join(f"{found[kind]:12.1e}" for kind in INPUTS))
    print("\nRows of D through memory per token and block, forward, counted from the dataflow\n")
    for name in DATAFLOW:
        print(f"{name:26}{rows_moved(name):5d}")


if __name__ == "__main__":
    main()
