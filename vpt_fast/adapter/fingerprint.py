"""Fingerprints of frozen weights: they differ between checkpoints, not between dtypes of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpt_fast.models.interop.wrappers import whole

TOLERANCE = 1e-2
"""Tolerance relative to a weight's norm, above the error of rounding to bf16."""
_COLUMNS = 4096
_STEP = 2.0**-24
"""Spacing of float16's smallest numbers, whose rounding error is not relative to their size."""

Summary = Mapping[str, Any]
"""Shape, norm and projection of one tensor, as JSON values."""


def _signs(count: int) -> Tensor:
    """Return random signs (count,), the same on every machine and in every version."""
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's is not.
    signs = np.random.RandomState(0).randint(0, 2, size=count) * 2 - 1
    return torch.from_numpy(signs.astype(np.float64))


def _summary(weight: Tensor) -> Summary:
    flat = whole(weight.detach()).to("cpu", torch.float64).flatten()
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
    """Return shape, norm and a fixed random projection of each floating-point tensor, by name."""
    return {name: _summary(w) for name, w in weights.items() if w.is_floating_point()}


def difference(
    have: Mapping[str, Summary],
    expected: Mapping[str, Summary],
    tolerance: float = TOLERANCE,
    scales: Mapping[str, float] | None = None,
) -> str:
    """Return how two fingerprints differ, in words; "" if they do not.

    Args:
        have: Fingerprint of the weights.
        expected: Fingerprint that they should have.
        tolerance: Tolerance relative to each tensor's norm.
        scales: Lower bounds of the norms, by name.
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
