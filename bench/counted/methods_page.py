"""The table of prompt methods in docs/methods/compared.md: parameters, FLOP, launches and bytes.

    python -m bench.counted.methods_page [--page PAGE] [--check]

Replaces the text between the two marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from bench.compare.tables import replaced
from bench.counted.step_trace import CLASSES, step_ops
from bench.host import page as host_page
from bench.providers.models import OURS
from vpt_fast import (
    BPT,
    CVPT,
    DVPT,
    E2VPT,
    VAPT,
    VFPT,
    GateVPT,
    PromptMethod,
    VPTDeep,
    VPTShallow,
)
from vpt_fast.analysis.activation_memory import EAGER, SavedBytes
from vpt_fast.cli.work.methods import trained_parameters

MARKS = "<!-- methods: made by bench.counted.methods_page -->", "<!-- end of methods -->"
PAGE = Path(__file__).parent.parent.parent / "docs" / "methods" / "compared.md"
MODEL, BATCH, COUNTS, PROMPTS = "vit_base_patch16_224", 64, (10, 50, 100), 50
METHODS: tuple[tuple[PromptMethod, str], ...] = (
    (VPTShallow(), ""),
    (VPTDeep(), ""),
    (VAPT(), ""),
    (E2VPT(), "n = 5"),
    (VFPT(), "m = p / 2"),
    (BPT(), "c = 50"),
    (DVPT(), "block's own tokens"),
    (DVPT(source="feature"), "first block's tokens"),
    (CVPT(), ""),
    (GateVPT(), ""),
)
"""Methods with what tells two of a name apart, or says a size."""


def _line(method: PromptMethod, note: str, model: Any, meter: SavedBytes) -> str:
    counts = [trained_parameters(model, replace(method, num_prompts=p)) for p in COUNTS]
    own: Any = replace(method, num_prompts=PROMPTS)
    ops = step_ops(MODEL, OURS, own, BATCH, torch.bfloat16)
    flop = sum(op.flop for op in ops) / BATCH / 1e9
    saved = [meter.bytes_of(own, provider, BATCH) / 2**20 for provider in ("speed", EAGER)]
    cells = [
        f"{method.name}{f', {note}' if note else ''}",
        f"`{method.equation}`",
        *(f"{count:,}" for count in counts),
        f"{flop:.1f}",
        str(len(ops)),
        *(f"{size:,.0f}" for size in saved),
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return a line per method."""
    with torch.device("meta"):
        model: Any = timm.create_model(MODEL, num_classes=CLASSES)
    meter = SavedBytes(model, (3, 224, 224), torch.bfloat16)
    names = ", ".join(f"p = {p}" for p in COUNTS)
    return "\n".join(
        [
            f"Counted for {MODEL}: parameters beside the head at {names};",
            "GFLOP per image and launches of a training step, and MiB that are saved for backward,",
            f"by vpt_fast and by concatenation, at p = {PROMPTS}, batch {BATCH}, bf16.",
            "",
            f"| method | prompts | {' | '.join(map(str, COUNTS))} | GFLOP | launches | MiB | "
            "MiB, eager |",
            f"|---|---|{'---:|' * (len(COUNTS) + 4)}",
            *(_line(method, note, model, meter) for method, note in METHODS),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page; with --check only report whether it is up to date (1 if not)."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted.methods_page", description=__doc__
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    try:
        old = options.page.read_text(encoding="utf-8")
        new = replaced(old, table(), MARKS)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return host_page.finish(options.page, old, new, options.check)


if __name__ == "__main__":
    sys.exit(main())
