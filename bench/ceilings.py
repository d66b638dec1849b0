"""Highest rates that a device reaches: one large matrix product, one large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.compare.device_timer import repeats
from bench.gpu.device import Device

SIZES = {"cuda": (8192, 2**30), "cpu": (256, 2**20)}
"""Rows of the square matrices and bytes of the copy. The CPU sizes only exercise the code."""

ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Best rates over several rounds.

    Attributes:
        tflops: 10^12 FLOP per second of a bf16 matrix product with fp32 accumulation.
        gb_per_s: 10^9 bytes per second, read and written, of a copy.
    """

    tflops: float
    gb_per_s: float


def measure_ceilings(device: Device, sizes: tuple[int, int] | None = None) -> Ceilings:
    """Measure the rates of a matrix product and of a copy.

    Args:
        device: Device to measure.
        sizes: Rows of the square matrices, and bytes of the copy; `SIZES` by default.
    """
    rows, nbytes = SIZES[device.name] if sizes is None else sizes
    # Random like activations: zeros would draw less power and allow a higher clock.
    a, b = torch.randn(2, rows, rows, device=device.name).to(torch.bfloat16)
    product = torch.empty_like(a)
    source = torch.randn(nbytes // 4, device=device.name)
    copy = torch.empty_like(source)

    def best(run) -> float:  # type: ignore[no-untyped-def]
        count = repeats(device.timer, run)
        return min(device.timer.seconds(run, count) for _ in range(ROUNDS))

    flop = 2 * rows**3
    return Ceilings(
        flop / best(lambda: torch.mm(a, b, out=product)) / 1e12,
        2 * source.nbytes / best(lambda: copy.copy_(source)) / 1e9,
    )
