"""Plots of a results file: speed-up by prompts, step time by batch size, memory by depth.

python -m bench.compare.plots bench/results/NAME.csv [--output PICTURE.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.compare.collect import read
from bench.providers.models import COMPILED, CUDNN, OURS, PROVIDERS, WITHOUT
from vpt_fast.train.common.style import COLOURS, GRID, INK, MUTED

COLOUR = dict(zip(PROVIDERS, [INK, *COLOURS[:5], MUTED], strict=False))
"""Colours by provider. A provider that only a GPU has takes the colour of its base provider,
except for the compiled vpt_fast.
"""
for _name, _base in {**CUDNN, **COMPILED}.items():
    COLOUR.setdefault(_name, COLOURS[5] if _base == OURS else COLOUR[_base])
_LABEL = {
    "published": "published: concatenation, explicit softmax, fp32",
    "concat": "concatenation, fused attention",
    "concat_compiled": "concatenation, fused attention, torch.compile",
    "keys_concat": "keys and values concatenated",
    "keys_concat_compiled": "keys and values concatenated, torch.compile",
    OURS: "vpt_fast",
    WITHOUT: "without prompts",
}
Row = Mapping[str, str]


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: Title of the diagram.
        across: Label of the horizontal axis.
        up: Label of the vertical axis.
        rows: Rows to draw.
        x: Column of the horizontal axis.
        y: Column of the vertical axis; with a 50th percentile, the 20th and 80th are drawn too.
        level: Height of a horizontal line, and its meaning.
    """

    title: str
    across: str
    up: str
    rows: Sequence[Row]
    x: str
    y: str
    level: tuple[float, str] | None = None


def select(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """Return the rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def most_varied(rows: Sequence[Row], column: str, bench: str = "step") -> list[Row]:
    """Return the longest series of VPT-Deep rows without dropout that differ only in `column`."""
    same = [name for name in ("model", "batch", "prompts", "dtype") if name != column]
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in select(rows, bench=bench, method="vpt-deep", dropout="0.0"):
        series.setdefault(tuple(row[name] for name in same), []).append(row)
    return max(series.values(), key=lambda s: len({row[column] for row in s}), default=[])


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Return the three diagrams, without those that have no rows."""
    by_prompts = [r for r in most_varied(rows, "prompts") if r["prompts"] != "0"]
    by_batch = most_varied(rows, "batch")
    memory = select(rows, bench="memory")
    found = [
        Panel(
            f"Training step, {_about(by_prompts, 'model', 'batch', 'dtype')}",
            "prompts", "time relative to vpt_fast",
            [r for r in by_prompts if r["provider"] != OURS], "prompts", "ratio_p50",
            (1.0, "vpt_fast"),
        ),
        Panel(
            f"Training step, {_about(by_batch, 'model', 'prompts', 'dtype')}",
            "images in the batch", "milliseconds per image",
            [{**r, **_per_image(r)} for r in by_batch], "batch", "image_p50",
        ),
        Panel(
            f"Saved for backward, {_about(memory, 'model', 'batch', 'dtype')}",
            "prompted blocks (the last ones), 50 prompts each", "MiB, counted",
            memory, "blocks", "kept_mib",
        ),
    ]  # fmt: skip
    return [panel for panel in found if panel.rows]


def _about(rows: Sequence[Row], *names: str) -> str:
    words = {"batch": "batch {}", "prompts": "{} prompts"}
    if not rows:
        return ""
    row = {**rows[0], "model": rows[0]["model"].removesuffix("_224")}
    return ", ".join(words.get(n, "{}").format(row[n]) for n in names)


def _per_image(row: Row) -> dict[str, str]:
    images = int(row["batch"])
    return {f"image_p{n}": str(float(row[f"p{n}_ms"]) / images) for n in (20, 50, 80)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the diagrams of a results file's rows.

    Raises:
        ValueError: If there is nothing to draw.
    """
    found = panels([row for row in rows if row["p50_ms"] or row["bench"] == "memory"])
    if not found:
        raise ValueError("no rows of training steps with several numbers of prompts or batch sizes")
    figure = Figure(figsize=(5.8 * len(found), 5.2), dpi=120, layout="constrained")
    figure.suptitle(_facts(rows[0]), color=MUTED, fontsize=10)
    shown: dict[str, Any] = {}
    for index, panel in enumerate(found, 1):
        shown |= _draw_panel(figure.add_subplot(1, len(found), index), panel)
    names = [name for name in PROVIDERS if name in shown]
    figure.legend(
        [shown[name] for name in names], [_LABEL[name] for name in names],
        loc="outside lower center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def _facts(row: Row) -> str:
    where = f"{row['device']}, {row['threads']} threads" if not row["cuda"] else row["device"]
    return f"{where}, torch {row['torch']}, timm {row['timm']}, {row['date']}"


def _draw_panel(ax: Axes, panel: Panel) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for provider in PROVIDERS:
        rows = sorted(select(panel.rows, provider=provider), key=lambda r: int(r[panel.x]))
        if not rows:
            continue
        x = [int(row[panel.x]) for row in rows]
        y = [float(row[panel.y]) for row in rows]
        style: dict[str, Any] = {"color": COLOUR[provider], "marker": "o", "markersize": 4}
        if len(rows) == 1 and x == [0]:
            drawn[provider] = ax.axhline(y[0], color=COLOUR[provider], linestyle="--")
            continue
        (drawn[provider],) = ax.plot(x, y, linewidth=2 if provider == OURS else 1.4, **style)
        if panel.y.endswith("p50"):
            low, high = (
                [float(row[panel.y.replace("p50", p)]) for row in rows] for p in ("p20", "p80")
            )
            ax.fill_between(x, low, high, color=COLOUR[provider], alpha=0.15, linewidth=0)
    if panel.level is not None:
        ax.axhline(panel.level[0], color=COLOUR[OURS], linewidth=2)
    if panel.x != "blocks":
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
    ticks = sorted({int(row[panel.x]) for row in panel.rows if row[panel.x] != "0"})
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_ylim(bottom=0)
    ax.set_title(panel.title, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(panel.across, color=MUTED)
    ax.set_ylabel(panel.up, color=MUTED)
    ax.grid(color=GRID, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots, and print the picture's path."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare.plots", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="PNG (default: next to the results)")
    options = parser.parse_args(arguments)
    path = options.output or options.results.with_suffix(".png")
    try:
        draw(read(options.results), path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
