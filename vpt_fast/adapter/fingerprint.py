"""A fingerprint of frozen weights: tells checkpoints apart, but not a cast of the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-2  # relative to the weight's norm; rounding to bf16 stays below it
_COLUMNS = 4096
_STEP = 2.0**-24
"""Of float16's smallest numbers: those it rounds to are no multiples of what they were."""

Summary = Mapping[str, Any]
"""Shape, norm and projection of one tensor, as JSON values."""


def _signs(count: int) -> Tensor:
    """Fixed random signs (count,), the same on every machine and in every version."""
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's is not.
    signs = np.random.RandomState(0).randint(0, 2, size=count) * 2 - 1
    return torch.from_numpy(signs.astype(np.float64))


def _summary(weight: Tensor) -> Summary:
    flat = weight.detach().to("cpu", torch.float64).flatten()
    rows = -(-flat.numel() // _COLUMNS)
    padded = torch.zeros(rows * _COLUMNS, dtype=torch.float64)
    padded[: flat.numel()] = flat
    signs = _signs(_COLUMNS + rows)
    projection = signs[_COLUMNS:] @ (padded.view(rows, _COLUMNS) @ signs[:_COLUMNS])
    return {
        "shape": list(weight.shape),
        "norm": float(flat.norm()),
        "projection": float(projection),
    }


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, Summary]:
    """Shape, norm and one fixed random projection of every floating-point tensor, by name."""
    return {name: _summary(w) for name, w in weights.items() if w.is_floating_point()}


def difference(
    have: Mapping[str, Summary],
    expected: Mapping[str, Summary],
    tolerance: float = TOLERANCE,
    scales: Mapping[str, float] | None = None,
) -> str:
    """Say how weights differ from those that are expected; "" if they do not.

    Args:
        have: fingerprint of the weights.
        expected: fingerprint that they should have.
        tolerance: relative to the norm.
        scales: by name, what a norm is taken for where it is less.
    """
    for name in have:
        if name not in expected:
            return f"the backbone has {name}, the adapter's has none"
    for name, want in expected.items():
        if name not in have:
            return f"the backbone has no {name}"
        found = have[name]
        if found["shape"] != list(want["shape"]):
            return f"{name} has shape {tuple(found['shape'])}, not {tuple(want['shape'])}"
        norm = max(want["norm"], (scales or {}).get(name, 0.0))
        allowed = tolerance * norm + _STEP * math.sqrt(math.prod(want["shape"]))
        for key in ("norm", "projection"):
            # The projection of a weight is of the order of its norm.
            if not abs(found[key] - want[key]) <= allowed:
                return f"{name} has other values ({key} {found[key]:.6g}, not {want[key]:.6g})"
    return ""
