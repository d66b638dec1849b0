"""Declared and executed bytes of launches that run under ttsem."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from bench.counted import declared
from bench.counted.trace import distinct_bytes, regions_of
from bench.counted.traffic import counted
from vpt_fast.kernels.runtime.launch import Launch

Bytes = dict[str, tuple[int, int]]
"""Bytes loaded and stored by the name of the launch."""


@contextlib.contextmanager
def both() -> Iterator[tuple[Bytes, Bytes]]:
    """Yield declared and executed bytes of the launches inside, each kernel at most once."""
    declared_bytes: Bytes = {}
    executed_bytes: Bytes = {}
    run = Launch.run

    def counting(launch: Launch) -> None:
        assert launch.name not in declared_bytes
        touched = declared.declared(launch)
        declared_bytes[launch.name] = (
            distinct_bytes(regions_of(touched.loads)),
            distinct_bytes(regions_of(touched.stores)),
        )
        with counted() as traffic:
            run(launch)
        executed_bytes[launch.name] = traffic.distinct("load"), traffic.distinct("store")

    with mock.patch.object(Launch, "run", counting):
        yield declared_bytes, executed_bytes


class Draw:
    """Seeded random tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(dtype or self.dtype).to(self.device)
