"""The tables of host time in docs/benchmarks/host.md, generated from the results of `bench.host`.

    python -m bench.host.page [bench/results/host_*.csv ...] [--page PAGE] [--check]

Replaces the text between the two marks: a table per file, a row per case.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.compare.collect import RESULTS
from bench.compare.tables import replaced
from bench.host.cases import DEPTH, INFERENCE
from bench.host.host import FIRST
from bench.providers.models import OURS

MARKS = "<!-- host tables: made by bench.host.page -->", "<!-- end of host tables -->"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "host.md"
PATTERN = "host_*.csv"

MODELS = {
    "vit": f"ViT, {DEPTH} blocks",
    "vit_layerscale": f"ViT with LayerScale, {DEPTH} blocks",
    "swin": f"Swin, {DEPTH} blocks",
}
PROVIDERS = {
    "without_prompts": "timm's model without prompts",
    "concat": "concatenation",
    "keys_concat": "keys and values concatenated",
    OURS: "ours",
}
METHODS = {"vpt-deep": "VPT-Deep", "vapt": "VAPT", "": ""}

Row = Mapping[str, str]


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file of `bench.host`.

    Raises:
        ValueError: If it is not such a file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or rows[0].get("bench") != "host":
        raise ValueError(f"{path} is not a results file of bench.host")
    return rows


def latest(folder: Path = RESULTS) -> Path:
    """Return the results file of the newest torch, the most recent one if there are several.

    Raises:
        ValueError: If there is none.
    """
    found = [(path, read(path)[0]) for path in sorted(folder.glob(PATTERN))]
    if not found:
        raise ValueError(f"{folder} has no {PATTERN}; `python -m bench.host` creates one")

    def age(pair: tuple[Path, Row]) -> tuple[list[int], str]:
        release = pair[1]["torch"].split("+")[0].split(".")
        return [int(n) for n in release if n.isdigit()], pair[1]["date"]

    return max(found, key=age)[0]


def _line(whole: Row, parts: Mapping[str, Row]) -> str:
    what = ", ".join(
        filter(
            None,
            (
                MODELS[whole["model"]],
                "inference" if whole["work"] == INFERENCE else "step",
                METHODS[whole["method"]],
                PROVIDERS[whole["provider"]],
                "" if whole["memory"] in ("", "speed") else f'memory "{whole["memory"]}"',
            ),
        )
    )
    times = [
        f"{float(parts[part]['least_ms']):.2f}" if part in parts else ""
        for part in ("forward", "backward")
    ]
    both = f"{float(whole['least_ms']):.2f} ({float(whole['p50_ms']):.2f})"
    ratios = [
        f"{float(row['ratio_least']):.2f} ({float(row['ratio_p50']):.2f})"
        for row in (whole, parts[FIRST])
    ]
    return f"| {' | '.join([what, *times, both, *ratios, whole['launches']])} |"


def table(rows: Sequence[Row]) -> str:
    """Return one file's rows as a table."""
    by: dict[str, dict[str, Row]] = {}
    for row in rows:
        by.setdefault(row["subject"], {})[row["part"]] = row
    known = rows[0]
    return "\n".join(
        [
            f"Measured on {known['device']}, Python {known['python']}, torch {known['torch']}, "
            f"Triton {known['triton']}, timm {known['timm']}, {known['date']}.",
            f"CPU time of the thread in ms, least of {known['rounds']} rounds (median); over the",
            "same model without prompts: least over least (median of the rounds' ratios).",
            "",
            "| | forward | backward | whole | over no prompts | first call | our kernels |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_line(parts["whole"], parts) for parts in by.values()),
        ]
    )


def finish(page: Path, old: str, new: str, check: bool) -> int:
    """Write a page, or only report whether it would change; return the exit status."""
    if check:
        print(f"{page}: {'up to date' if new == old else 'out of date'}")
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    print(page)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page; with --check only report whether it is up to date (1 if not)."""
    parser = argparse.ArgumentParser(prog="python -m bench.host.page", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help=f"default {PATTERN} of {RESULTS}")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    paths = options.results or sorted(RESULTS.glob(PATTERN))
    if not paths:
        parser.error(f"{RESULTS} has no {PATTERN}; `python -m bench.host` creates one")
    try:
        old = options.page.read_text(encoding="utf-8")
        new = replaced(old, "\n\n".join(table(read(path)) for path in paths), MARKS)
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    return finish(options.page, old, new, options.check)


if __name__ == "__main__":
    sys.exit(main())
