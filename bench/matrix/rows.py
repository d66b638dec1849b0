"""The versions that a wheel is tried with: the one table of them.

A row fixes what decides: Python, torch with the torchvision and the Triton that belong to it, and
timm. All else is what pip chooses that day. The lowest version of each is in some row, and so is
the highest; `setup.py` declares the lowest.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Versions of one environment.

    Attributes:
        python: Major and minor version of the interpreter.
        torch: Release of PyTorch.
        torchvision: Release that is built for it.
        triton: Release that torch requires on Linux.
        timm: Release of timm.
    """

    python: str
    torch: str
    torchvision: str
    triton: str
    timm: str

    @property
    def name(self) -> str:
        """Name on the command line: Python's version and torch's."""
        return f"{self.python}-{self.torch}"


ROWS = (
    Row("3.10", "2.8.0", "0.23.0", "3.4.0", "1.0.29"),
    Row("3.12", "2.9.1", "0.24.1", "3.5.1", "1.0.30"),
    Row("3.13", "2.11.0", "0.26.0", "3.6.0", "1.0.31"),
    Row("3.12", "2.12.1", "0.27.1", "3.7.1", "1.0.29"),
    Row("3.11", "2.14.1", "0.29.1", "3.8.0", "1.0.31"),
)
"""Environments that `python -m bench.matrix` makes, one after the other."""


def lowest(package: str) -> str:
    """Return the lowest version of a package, or of Python, that a row has."""
    return min((getattr(row, package) for row in ROWS), key=_parts)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
