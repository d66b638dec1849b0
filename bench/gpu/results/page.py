"""One page of plots of a GPU benchmark's results.

Times, memory and ceilings are measured, FLOP and bytes counted. The times on the last diagram's
horizontal axis are modelled (`bench.counted.roofline`), for GPUs whose peaks are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.compare.cases import STEP
from bench.compare.plots import COLOUR, Row, most_varied, select
from bench.gpu.results.counted import Counted
from bench.providers.models import GPU_PROVIDERS, OURS, PUBLISHED
from vpt_fast.train.common.style import GRID, INK, MUTED

_GRAPH_ALPHA = 0.45
_PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")


def draw(rows: Sequence[Row], path: Path, counted: Sequence[Counted | None] = ()) -> None:
    """Draw the page.

    Args:
        rows: Rows of a results file.
        path: PNG file to write.
        counted: Counted work of each row, with the modelled times; without it none are drawn.
    """
    modelled = [
        (row, work)
        for row, work in zip(rows, counted, strict=False)
        if work is not None and work.eager_ms and row["bench"] == STEP and row["p50_ms"]
    ]
    timed = [row for row in rows if row["p50_ms"] and row["memory"] in ("", "speed")]
    by_prompts = most_varied(timed, "prompts")
    one = _fullest(timed)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
    figure = Figure(figsize=(16, 10.4), dpi=110, layout=layout)
    figure.suptitle(_heading(rows, one), color=INK, fontsize=12)
    axes = iter(figure.subplots(2, 3).flat)
    at = f"at {one[0]['prompts']} prompts" if one else ""
    for title, function in (
        (f"Time relative to {OURS}, by prompts", lambda ax: _speedup(ax, by_prompts)),
        (f"Time of a step {at}", lambda ax: _step_time(ax, one)),
        ("Peak memory, by prompts", lambda ax: _memory(ax, by_prompts)),
        (f"Achieved TFLOP/s {at}", lambda ax: _rate(ax, one, "tflops", "TFLOP/s")),
        (f"Achieved GB/s {at}", lambda ax: _rate(ax, one, "gb_per_s", "GB/s")),
        ("Measured and modelled, all training steps", lambda ax: _model(ax, modelled)),
    ):
        ax = next(axes)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        _clean(ax)
        function(ax)
    shown = {row["provider"] for row in rows}
    names = [name for name in GPU_PROVIDERS if name in shown]
    handles: list[Artist] = [
        Line2D([], [], color=COLOUR[name], marker="o", linewidth=2) for name in names
    ]
    if any(row["graph_p50_ms"] for row in one):
        names += ["bar: eager", "bar: CUDA graph"]
        handles += [Patch(color=MUTED), Patch(color=MUTED, alpha=_GRAPH_ALPHA)]
    figure.legend(handles, names, loc="outside lower center", ncols=9, frameon=False, fontsize=10)
    figure.savefig(path)


def _fullest(rows: Sequence[Row]) -> list[Row]:
    """Return the training steps of the VPT-Deep comparison with the most providers."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in select(rows, bench=STEP, method="vpt-deep", dropout="0.0", memory="speed"):
        groups.setdefault(tuple(row[n] for n in ("model", "batch", "prompts")), []).append(row)
    best = max(groups.values(), key=len, default=[])
    return sorted(best, key=lambda row: GPU_PROVIDERS.index(row["provider"]), reverse=True)


def _heading(rows: Sequence[Row], one: Sequence[Row]) -> str:
    row = rows[0]
    words = [row["device"], f"torch {row['torch']}", f"triton {row['triton']}"]
    words += [f"CUDA {row['cuda']}"] if row["cuda"] else ["a trial on a CPU"]
    first = ", ".join([*words, row["commit"], row["date"]])
    second = "times, memory and ceilings measured; FLOP and bytes counted"
    if one:
        step = f"{one[0]['model']}, batch {one[0]['batch']}, {one[0]['dtype']} (published: fp32)"
        second = f"Training step of {step}; {second}"
    return f"{first}\n{second}"


def _clean(ax: Axes) -> None:
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=MUTED)


def _nothing(ax: Axes, why: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=ax.transAxes)


def _lines(ax: Axes, rows: Sequence[Row], column: str) -> None:
    """Draw a line per provider over the number of prompts."""
    rows = [row for row in rows if row[column] and row["prompts"] != "0"]
    if not rows:
        return _nothing(ax, "not measured")
    for provider in GPU_PROVIDERS:
        mine = sorted(select(rows, provider=provider), key=lambda row: int(row["prompts"]))
        width = 2.4 if provider == OURS else 1.4
        ax.plot(
            [int(row["prompts"]) for row in mine], [float(row[column]) for row in mine],
            color=COLOUR[provider], marker="o", markersize=4, linewidth=width,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        # A narrow range may contain fewer than two of 1, 2 and 5 times a power of ten.
        narrow = high < 5 * low
        axis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(_PLAIN)
        axis.set_minor_locator(NullLocator())
    ax.set_xticks(sorted({int(row["prompts"]) for row in rows}))
    ax.set_xlabel("prompts", color=MUTED)
    return None


def _speedup(ax: Axes, rows: Sequence[Row]) -> None:
    _lines(ax, rows, "ratio_p50")
    ax.set_ylabel(f"above 1, {OURS} is faster", color=MUTED)


def _memory(ax: Axes, rows: Sequence[Row]) -> None:
    _lines(ax, rows, "peak_mib")
    ax.set_ylabel("MiB", color=MUTED)


def _bars(ax: Axes, rows: Sequence[Row], values: Sequence[float], graph: Sequence[float]) -> None:
    """Draw a bar per provider, and a lighter one for its replay as a graph."""
    both = any(graph)
    height = 0.38 if both else 0.6
    colours = [COLOUR[row["provider"]] for row in rows]
    shift = height / 2 if both else 0.0
    positions = range(len(rows))
    eager = ax.barh([y + shift for y in positions], values, height, color=colours)
    drawn = [eager]
    if both:
        drawn.append(
            ax.barh(
                [y - shift for y in positions], graph, height, color=colours,
                alpha=_GRAPH_ALPHA,
            )
        )  # fmt: skip
    right = _room(rows, values, graph)
    ax.set_xlim(0, right)
    for bar in (bar for bars in drawn for bar in bars):
        width = bar.get_width()
        if width:
            cut = width > right
            ax.annotate(
                f"{_plain(width)} (cut off)" if cut else _plain(width),
                (min(width, right), bar.get_y() + bar.get_height() / 2),
                (-4 if cut else 4, 0), textcoords="offset points", va="center",
                ha="right" if cut else "left", fontsize=8, color="white" if cut else INK,
            )  # fmt: skip
    ax.set_yticks(list(positions), [row["provider"] for row in rows])
    ax.grid(axis="y", visible=False)


def _room(rows: Sequence[Row], values: Sequence[float], graph: Sequence[float]) -> float:
    """Return the end of the axis: a bar that is several times the others is cut off."""
    largest = [max(pair) for pair in zip(values, graph, strict=True)]
    others = [
        n for row, n in zip(rows, largest, strict=True) if row["provider"] != PUBLISHED
    ] or largest
    return 1.2 * (max(largest) if max(largest) < 2 * max(others) else max(others))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(text: str) -> float:
    return float(text) if text else 0.0


def _step_time(ax: Axes, rows: Sequence[Row]) -> None:
    if not rows:
        return _nothing(ax, "not measured")
    _bars(
        ax, rows, [float(row["p50_ms"]) for row in rows],
        [_number(row["graph_p50_ms"]) for row in rows],
    )  # fmt: skip
    ax.set_xlabel("milliseconds, median", color=MUTED)
    return None


def _rate(ax: Axes, rows: Sequence[Row], column: str, unit: str) -> None:
    """Draw counted work over measured time, with the measured ceiling."""
    rows = [row for row in rows if row[column]]
    if not rows:
        return _nothing(ax, "not counted")
    rates = [float(row[column]) for row in rows]
    graph = [
        rate * float(row["p50_ms"]) / _number(row["graph_p50_ms"]) if row["graph_p50_ms"] else 0.0
        for row, rate in zip(rows, rates, strict=True)
    ]
    _bars(ax, rows, rates, graph)
    ceiling = _number(rows[0][f"{column}_ceiling"])
    words = f"{unit}, counted work over measured time"
    if ceiling:
        ax.axvline(ceiling, color=INK, linestyle=":", linewidth=1.6)
        ax.set_xlim(right=max(ceiling, *rates, *graph) * 1.15)
        words += f"; dotted: the device's {ceiling:.4g}"
    ax.set_xlabel(words, color=MUTED)
    return None


def _model(ax: Axes, rows: Sequence[tuple[Row, Counted]]) -> None:
    """Draw measured over modelled times, of eager steps and of graphs."""
    if not rows:
        return _nothing(ax, "not modelled: no published peaks of this device are known here")
    seen: list[float] = []
    for row, work in rows:
        colour, method = COLOUR[row["provider"]], row["method"]
        for modelled, column, face in (
            (work.eager_ms, "p50_ms", colour), (work.graph_ms, "graph_p50_ms", "none"),
        ):  # fmt: skip
            if row[column] and modelled:
                marker = "o" if method == "vpt-deep" else "D"
                ax.plot(modelled, float(row[column]), marker, color=colour, mfc=face, ms=5)
                seen += [modelled, float(row[column])]
    ends = min(seen) / 1.4, max(seen) * 1.4
    ax.plot(ends, ends, color=INK, linewidth=1, linestyle=":")
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(_PLAIN)
        axis.set_minor_locator(NullLocator())
    handles = [
        Line2D([], [], color=MUTED, marker=m, mfc=f, lw=0)
        for m, f in (("o", MUTED), ("o", "none"), ("D", MUTED))
    ]
    ax.legend(handles, ["eager", "CUDA graph", "VAPT"], loc="upper left", frameon=False, fontsize=9)
    ax.set_xlabel("modelled, milliseconds", color=MUTED)
    ax.set_ylabel("measured, milliseconds", color=MUTED)
    return None
