"""Reads and writes the launch table of attention, `kernels/attention/launch_table.py`."""

from __future__ import annotations

import runpy
from collections.abc import Collection
from pathlib import Path

from vpt_fast.kernels.attention import launch_table
from vpt_fast.kernels.attention.tiles import DTYPE_NAMES, HEAD_DIMS, KERNELS, Key, Table

TABLE_FILE = Path(launch_table.__file__)

_HEADER = '''\
"""Launch table of the attention kernels, written by `python -m bench.tiles.tune --write`.

(kernel, head dimension, dtype, architecture): (rows, rows per loop iteration, warps, stages)

`tiles` says what the rows are, which shapes narrow them, and which entry other head
dimensions and architectures take. Entries are chosen from static figures, without a GPU (compiled
code, and issue cycles modelled from it, by the rules of `bench.tiles.candidates`); those that
`MEASURED` names, from times measured on a GPU.
"""

Key = tuple[str, int, str, int | str]

'''


def _order(key: Key) -> tuple[int, int, int, bool, int, str]:
    kernel, head_dim, dtype, architecture = key
    named = isinstance(architecture, str)
    return (
        KERNELS.index(kernel),
        HEAD_DIMS.index(head_dim),
        list(DTYPE_NAMES.values()).index(dtype),
        named,
        0 if isinstance(architecture, str) else architecture,
        str(architecture),
    )


def _literal(value: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in value) + ")"


def table_text(table: Table, measured: Collection[Key]) -> str:
    """Return the file's text, as `ruff format` leaves it.

    Args:
        table: Every entry.
        measured: Keys of the entries that were chosen from measured times.

    Raises:
        ValueError: If an entry that was measured is not in the table.
    """
    missing = [key for key in measured if key not in table]
    if missing:
        raise ValueError(f"measured, but not in the table: {missing}; add them or leave them out")
    entries = [
        f"    {_literal(key)}: {_literal(table[key])},\n" for key in sorted(table, key=_order)
    ]
    marks = [f"    {_literal(key)},\n" for key in sorted(measured, key=_order)]
    return (
        _HEADER
        + "TABLE: dict[Key, tuple[int, int, int, int]] = {\n"
        + "".join(entries)
        + "}\n\nMEASURED: tuple[Key, ...] = ("
        + ("\n" + "".join(marks) if marks else "")
        + ")\n"
    )


def write_table(path: Path, table: Table, measured: Collection[Key]) -> None:
    """Write the file; arguments as for `table_text`."""
    path.write_text(table_text(table, measured), encoding="utf-8")


def read_table(path: Path) -> tuple[Table, tuple[Key, ...]]:
    """Return the table in a file, and the keys of its measured entries."""
    names = runpy.run_path(str(path))
    return names["TABLE"], names["MEASURED"]
