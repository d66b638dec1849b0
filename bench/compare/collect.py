"""Results of a benchmark run as a CSV file: one row per comparison and provider.

    python -m bench.compare.collect RUN.json [--output bench/results]

RUN.json is written by pytest-benchmark. The file is named after the machine and the main versions;
its columns hold all of them. `ratio` is the provider's time divided by ours in the same round, as
its 20th, 50th and 80th percentile over the rounds: above 1, ours is faster. Rows of bench "memory"
are counted (see `vpt_fast.analysis.activation_memory`), all others measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.facts import file_stem
from bench.counted.saved_bytes import saved_rows
from bench.providers.models import OURS

RESULTS = Path(__file__).parents[1] / "results"

WHAT = (
    "kind", "bench", "model", "method", "batch", "prompts", "blocks", "dropout", "dtype",
    "image_size", "provider",
)  # fmt: skip
TIMES = ("p20_ms", "p50_ms", "p80_ms", "ratio_p20", "ratio_p50", "ratio_p80", "rounds", "error")
MEMORY = ("kept_mib", "peak_mib")
RATES = ("tflops", "tflops_ceiling", "gb_per_s", "gb_per_s_ceiling", "graph_p50_ms")
FACTS = (
    "device", "cores", "threads", "system", "python", "torch", "triton", "timm", "numpy", "cuda",
    "commit", "date",
)  # fmt: skip
FIELDS = (*WHAT, *TIMES, *MEMORY, *RATES, "note", *FACTS)
"""Columns. Times are milliseconds, memory MiB; `error` is the largest relative error against fp64,
`blocks` the number of prompted blocks if not all have prompts. Ceilings are the highest rates of
the same device, measured in the same run with one large product and one large copy. `note` says why
a row has no times.
"""

Row = dict[str, Any]


def percentiles(seconds: Sequence[float], prefix: str = "p", suffix: str = "_ms") -> Row:
    """Return the 20th, 50th and 80th percentile of seconds, in milliseconds."""
    found = np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80))
    return {f"{prefix}{n}{suffix}": f"{v:.4g}" for n, v in zip((20, 50, 80), found, strict=True)}


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Row:
    """Return percentiles of a provider's time over ours, round by round."""
    found = np.percentile(np.asarray(theirs) / np.asarray(ours), (20, 50, 80))
    return {f"ratio_p{n}": f"{v:.3f}" for n, v in zip((20, 50, 80), found, strict=True)}


def rows_of(run: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a run that pytest-benchmark wrote, in its order.

    Raises:
        ValueError: If the run is not one of these benchmarks, or lacks the times of its rounds.
    """
    try:
        known = run["machine_info"]["vpt_fast"]
        times = {
            (b["group"], b["extra_info"]["provider"]): b["stats"]["data"] for b in run["benchmarks"]
        }
    except KeyError as missing:
        raise ValueError(
            f"the run has no {missing}: create it with `python -m pytest bench --benchmark-enable "
            "--benchmark-json=RUN.json`"
        ) from None
    facts = {**known, "date": run["datetime"][:10]}
    rows = []
    for benchmark in run["benchmarks"]:
        group, info = benchmark["group"], benchmark["extra_info"]
        seconds = times[group, info["provider"]]
        row = {
            **{name: info.get(name, "") for name in WHAT},
            "kind": "measured",
            "error": f"{info['error']:.2g}",
            "rounds": len(seconds),
            **percentiles(seconds),
        }
        if (group, OURS) in times:
            row |= ratios(seconds, times[group, OURS])
        rows.append({**row, **facts})
    return rows


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a CSV file; columns that a row lacks are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file.

    Raises:
        ValueError: If it is not a results file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(FIELDS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no columns {', '.join(sorted(missing))}")
        return list(reader)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results file and print its path."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare.collect", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="directory (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        run = json.loads(options.run.read_text(encoding="utf-8"))
        rows = rows_of(run)
    except (OSError, ValueError) as error:
        parser.error(f"{options.run}: {error}")
    facts = {name: rows[0][name] for name in FACTS if name in rows[0]} if rows else {}
    path = options.output / f"{file_stem(run['machine_info']['vpt_fast'])}.csv"
    write([*rows, *({**row, **facts} for row in saved_rows())], path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
