"""The benchmark tables of docs/benchmarks/cpu.md, generated from a results file.

    python -m bench.compare.tables bench/results/NAME.csv [--page PAGE] [--check]

Replaces the text between the two marks. The tables show every comparison in the file, including
those that are slower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from bench.compare.collect import read
from bench.providers.models import OURS, PROVIDERS

BEGIN, END = (
    "<!-- benchmark tables: made by bench.compare.tables -->",
    "<!-- end of benchmark tables -->",
)
PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks" / "cpu.md"

TITLES = {
    "step": "Training step (forward, loss and backward)",
    "inference": "Inference",
    "attention": "Attention alone, forward and backward",
    "experts": "VAPT's expert update alone, forward and backward",
}
HEADS = {
    "published": "published: concatenation, explicit softmax",
    "concat": "concatenation, fused attention",
    "concat_compiled": "the same, compiled",
    "keys_concat": "keys and values concatenated",
    "keys_concat_compiled": "the same, compiled",
    "without_prompts": "no prompts",
}
OWN_HEADS = {"experts": {"concat": "the equations as written"}}

_TABLE = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
Measured on {{ facts.device }}, {{ facts.threads }} threads, torch {{ facts.torch }}, timm \
{{ facts.timm }}, {{ facts.date }}; fp32 unless a
row names another dtype. A cell is a provider's time divided by ours in the same round (the rounds
are interleaved): median (20th to 80th percentile) over {{ rounds }} rounds. Above 1, ours is
faster.

{% for table in tables %}
{{ table.title }}:

| {{ table.columns | join(" | ") }} |
|{% for _ in table.columns %}---|{% endfor %}

{% for row in table.rows %}
| {{ row | join(" | ") }} |
{% endfor %}

{% endfor %}
"""
)

Row = Mapping[str, str]


def _case(row: Row) -> tuple[str, ...]:
    names = ("model", "image_size", "method", "dtype", "batch", "dropout", "prompts")
    return tuple(row[name] for name in names)


def _cells(rows: Iterable[Row], providers: Sequence[str]) -> list[str]:
    found = {row["provider"]: row for row in rows}
    cells = []
    for name in providers:
        row = found.get(name)
        if row is None:
            cells.append("")
        elif not row["ratio_p50"]:
            cells.append("not timed")
        else:
            low, middle, high = (f"{float(row[f'ratio_p{n}']):.2f}" for n in (20, 50, 80))
            cells.append(f"{middle} ({low} - {high})")
    mine = found[OURS]["p50_ms"] if OURS in found else ""
    return [*cells, f"{float(mine):.3g} ms" if mine else ""]


def table(rows: Sequence[Row], bench: str) -> dict[str, object] | None:
    """Return the table of one kind of work: title, column heads and cells; None without rows."""
    rows = [row for row in rows if row["bench"] == bench]
    present = {row["provider"] for row in rows}
    providers = [name for name in PROVIDERS if name in present and name != OURS]
    if not rows or not providers:
        return None
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    lines = []
    for (model, size, method, dtype, batch, dropout, prompts), group in cases.items():
        pixels = f"{size} px" if size and size != "224" else ""
        parts = (_short(model), pixels, method, _dtype(dtype), f"batch {batch}")
        what = ", ".join(filter(None, parts))
        if dropout and float(dropout):
            what += f", dropout {float(dropout):g}"
        lines.append([what, prompts, *_cells(group, providers)])
    heads = {**HEADS, **OWN_HEADS.get(bench, {})}
    columns = ["", "prompts", *(heads[name] for name in providers), "ours"]
    return {"title": TITLES[bench], "columns": columns, "rows": lines}


def _short(model: str) -> str:
    sizes = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}
    parts = model.split("_")
    if len(parts) == 4 and parts[0] == "vit" and parts[1] in sizes:
        name = "ViT" if parts[3].isdecimal() else {"dinov3": "DINOv3"}.get(parts[3])
        if name is not None:
            return f"{name}-{sizes[parts[1]]}/{parts[2].removeprefix('patch')}"
    if len(parts) == 5 and parts[0] == "swin" and parts[3].startswith("window"):
        return f"Swin-{parts[1][0].upper()}"
    return model


def _dtype(dtype: str) -> str:
    return "" if dtype == "float32" else dtype


def render(rows: Sequence[Row]) -> str:
    """Return the text between the marks.

    Raises:
        ValueError: If there are no measured rows.
    """
    measured = [row for row in rows if row["kind"] == "measured"]
    if not measured:
        raise ValueError("the file has no measured rows")
    tables = [found for bench in TITLES if (found := table(measured, bench))]
    rounds = sorted({int(row["rounds"]) for row in measured if row["rounds"]})
    text = "-".join(str(n) for n in sorted({rounds[0], rounds[-1]})) if rounds else "0"
    return _TABLE.render(facts=measured[0], tables=tables, rounds=text).strip()


def replaced(text: str, tables: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Return a page with new tables between its marks.

    Raises:
        ValueError: If a mark is missing.
    """
    first, last = marks
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page has no lines {first!r} and {last!r} to put tables between")
    return f"{before}{first}\n\n{tables}\n\n{last}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page; with --check only report whether it is up to date (1 if not)."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare.tables", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    try:
        old = options.page.read_text(encoding="utf-8")
        new = replaced(old, render(read(options.results)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check:
        print(f"{options.page}: {'up to date' if new == old else 'out of date'}")
        return int(new != old)
    options.page.write_text(new, encoding="utf-8")
    print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
