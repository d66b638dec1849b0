"""The table of what bounds a step, in docs/benchmarks/roofline.md, from the newest host times.

    python -m bench.counted.roofline_page [--host CSV] [--page PAGE] [--check]

Replaces the text between the two marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.compare.tables import replaced
from bench.counted.gpus import GPUS, Assumptions
from bench.counted.step_model import (
    HOST,
    Case,
    HostTimes,
    case_ops,
    host_ms,
    modelled_case,
    providers_of,
    work,
)
from bench.host import page as host_page
from bench.providers.models import COMPILED, PUBLISHED

MARKS = "<!-- bounds: made by bench.counted.roofline_page -->", "<!-- end of bounds -->"
PAGE = Path(__file__).parent.parent.parent / "docs" / "benchmarks" / "roofline.md"
GPU = GPUS["H100"]
CASES = (
    ("vit_base_patch16_224", 64),
    ("vit_tiny_patch16_224", 16),
    ("swin_tiny_patch4_window7_224", 64),
)
"""Models in timm, and batch sizes."""
PROMPTS = 50


def _line(case: Case, assumed: Assumptions, hosts: HostTimes) -> str:
    times = modelled_case(case, GPU, assumed, hosts)
    own = host_ms(hosts, case.model, case.provider)
    launches = work(case_ops(case)).launches
    cells = [
        f"{case.model}, batch {case.batch}, {case.provider}",
        str(launches),
        f"{own + 1e-3 * assumed.driver_us * launches:.1f}",
        f"{times.eager:.1f}",
        f"**{times.eager_bound}**" if times.eager_bound == HOST else times.eager_bound,
        f"{times.graph:.1f}",
        times.graph_bound,
    ]
    return f"| {' | '.join(cells)} |"


def table(hosts: HostTimes) -> str:
    """Return a line per model and provider."""
    assumed, known = Assumptions(), hosts.known
    cases = [
        Case(model, batch, PROMPTS, "bfloat16", provider)
        for model, batch in CASES
        for provider in providers_of(model)
        if provider != PUBLISHED and not (provider in COMPILED and "keys" in provider)
    ]
    return "\n".join(
        [
            f"{GPU.name}, bf16, {PROMPTS} prompts; host measured on {known['device']} with torch "
            f"{known['torch']} ({known['date']})\nand {assumed.driver_us:g} us per launch assumed.",
            "",
            "| | launches | host ms | eager ms | bound by | graph ms | bound by |",
            "|---|---:|---:|---:|---|---:|---|",
            *(_line(case, assumed, hosts) for case in cases),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page; with --check only report whether it is up to date (1 if not)."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted.roofline_page", description=__doc__
    )
    parser.add_argument(
        "--host", type=Path, help="results of bench.host; default: those of the newest torch"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    try:
        hosts = HostTimes(options.host or host_page.latest())
        old = options.page.read_text(encoding="utf-8")
        new = replaced(old, table(hosts), MARKS)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return host_page.finish(options.page, old, new, options.check)


if __name__ == "__main__":
    sys.exit(main())
