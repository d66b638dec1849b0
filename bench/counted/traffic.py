"""Bytes that a kernel moves, counted while its IR is executed on the CPU by ttsem.

Every element of every load and store of every program is counted; caches are not modelled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np


class Traffic:
    """Addresses that launches accessed.

    Attributes:
        issued_loads: Bytes that programs requested to load, repetitions included.
        issued_stores: Bytes that programs requested to store, repetitions included.
    """

    def __init__(self) -> None:
        self.issued_loads = 0
        self.issued_stores = 0
        self._spans: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def add(self, kind: str, addresses: Any, mask: Any, itemsize: int) -> None:
        """Count one load or store of one program."""
        addresses = np.asarray(addresses, dtype=np.int64)
        live = np.broadcast_to(True if mask is None else np.asarray(mask, bool), addresses.shape)
        flat = addresses[live].reshape(-1)
        if kind == "load":
            self.issued_loads += flat.size * itemsize
        else:
            self.issued_stores += flat.size * itemsize
        flat = np.unique(flat)
        self._spans[kind].append((flat[:, None] + np.arange(itemsize)).reshape(-1))

    def distinct(self, kind: str) -> int:
        """Return the distinct bytes of all loads ("load") or of all stores ("store")."""
        spans = self._spans[kind]
        return int(np.unique(np.concatenate(spans)).size) if spans else 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the traffic of all launches inside, which have to run in a session of ttsem."""
    from ttsem import memory

    Memory: Any = memory.Memory
    traffic = Traffic()
    load, store = Memory.load, Memory.store

    def counting_load(self: Any, addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        traffic.add("load", addrs, mask, np.dtype(dtype).itemsize)
        return load(self, addrs, mask, other, dtype)

    def counting_store(self: Any, addrs: Any, values: Any, mask: Any) -> Any:
        traffic.add("store", addrs, mask, np.asarray(values).dtype.itemsize)
        return store(self, addrs, values, mask)

    Memory.load, Memory.store = counting_load, counting_store
    try:
        yield traffic
    finally:
        Memory.load, Memory.store = load, store
