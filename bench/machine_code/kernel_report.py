"""Static report of every kernel: its machine code compared with limits, without a GPU.

    python -m bench.machine_code.kernel_report [--family attention plain experts rows heads windows]
        [--target 80 90] [--kernel forward] [--head-dim 64] [--width 768] [--dtype bf16]
        [--shape 197,50] [--all] [--output report.csv]

Every launch is compiled as the launcher would launch it, with the tiles of the launch table.
Registers, spills, shared memory and occupancy are the compiler's; cycles are modelled from the
instructions and published rates, as `bench.machine_code.figures` and
`bench.machine_code.reports.entry` define them. Nothing is run and nothing is timed. Limits are
those for the installed Triton (`bench.machine_code.limit_tables`). Without options the report
covers what the limits are for, bf16 on sm_80 and sm_90; with `--all` every head dimension, width,
dtype and target, which takes hours the first time. Windows have their own shapes and head dimension
(`bench.machine_code.reports.window_attention`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.machine_code.limits import JUDGED_TARGETS, PROBLEMS, WIDTHS, no_limits
from bench.machine_code.multiprocessor import AMD_SHARED_BLOCK, MULTIPROCESSORS
from bench.machine_code.offline import Architecture
from bench.machine_code.problems import attention as problems
from bench.machine_code.problems import rowwise as row_problems
from bench.machine_code.problems.attention import AttentionProblem
from bench.machine_code.problems.experts import ExpertProblem
from bench.machine_code.problems.rowwise import ACTIVATION_KERNELS, RowProblem
from bench.machine_code.reports import (
    experts as expert_report,
)
from bench.machine_code.reports import (
    grouped_heads as heads_report,
)
from bench.machine_code.reports import (
    plain_attention as plain_report,
)
from bench.machine_code.reports import (
    window_attention as window_report,
)
from bench.machine_code.reports.attention import attention_entry
from bench.machine_code.reports.entry import Entry, csv_rows, format_entry, header, write_csv
from bench.machine_code.reports.experts import expert_entry
from bench.machine_code.reports.grouped_heads import HeadsProblem, heads_entry
from bench.machine_code.reports.plain_attention import comparison, plain_entry
from bench.machine_code.reports.rowwise import row_entry
from bench.machine_code.reports.window_attention import window_entry

KERNELS = {
    "attention": (*problems.KERNELS, *problems.OTHER_KERNELS),
    "plain": plain_report.KERNELS,
    "experts": expert_report.KERNELS,
    "rows": row_problems.KERNELS,
    "heads": heads_report.KERNELS,
    "windows": window_report.KERNELS,
}
"""Names of the kernels by family; attention is compared with plain."""

HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS: tuple[Architecture, ...] = (*MULTIPROCESSORS, *AMD_SHARED_BLOCK)

TITLE = "Static figures, modelled from machine code and published rates; nothing was run or timed."
LEGEND = """\
useful      share of the issued matrix work that the problem needs
per unit    SM cycles of each pipe per useful 1,048,576 MMA FLOP, all programs of a launch: padding,
            prologue and epilogue included (under "instr" the whole program, under "trips" programs)
over memory the same over the cycles that device memory takes for what the launch has to move
loops       SM cycles of each pipe per iteration of one block, its instruction classes, and issue
            cycles per 1,048,576 MMA FLOP of the loop; narrow tiles of attention are counted over
            the FLOP of the usual tiles that they replace
-           unknown: gfx942's machine code is not read, sm_100's does not show its MMA FLOP;
            memory cycles are known for targets whose bandwidth multiprocessor.py has"""
COMPARISON = """\
Compared with plain flash attention on concatenated keys and values: SM cycles of each pipe per
useful 1,048,576 MMA FLOP, the same FLOP for all; copies: memory cycles of concatenating and
splitting."""


def _architecture(text: str) -> Architecture:
    """Parse an architecture from the command line: 90, sm_90 or gfx942."""
    number = text.removeprefix("sm_")
    if number.isdigit() and int(number) in MULTIPROCESSORS:
        return int(number)
    if text in AMD_SHARED_BLOCK:
        return text
    raise argparse.ArgumentTypeError(f"unknown target {text!r}: use {', '.join(map(str, TARGETS))}")


def _shape(text: str) -> tuple[int, int]:
    """Parse a shape from the command line: N,p."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"shape {text!r}: use N,p such as 197,50")
    return sizes[0], sizes[1]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    result = argparse.ArgumentParser(
        prog="python -m bench.machine_code.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels = [name for names in KERNELS.values() for name in names]
    add = result.add_argument
    add("--family", nargs="+", choices=KERNELS, default=list(KERNELS))
    add("--target", nargs="+", type=_architecture, help="default 80 90; all with --all")
    add("--kernel", nargs="+", choices=kernels, default=kernels, metavar="NAME")
    add("--shape", nargs="+", type=_shape, help="N,p of attention and experts; rows: 64 x 197")
    add("--head-dim", nargs="+", type=_positive, help="head dimensions of attention; default 64")
    add("--width", nargs="+", type=_positive, help="D of experts, rows, heads; default 768")
    add("--dtype", nargs="+", choices=DTYPES, help="default bf16")
    add("--all", action="store_true", help="every head dimension, width, dtype and target")
    add("--output", type=Path, help="CSV file to write; must not exist")
    return result


def patch_grid(tokens: int) -> tuple[tuple[int, int], int]:
    """Return the largest square of patches within so many tokens, and the number of other tokens.

    At least one token is left over.

    Raises:
        ValueError: If the square is smaller than 2 x 2, which the experts' convolution needs.
    """
    side = math.isqrt(tokens - 1)
    if side < 2:
        raise ValueError(f"{tokens} tokens: experts need at least 5, one and 2 x 2 patches")
    return (side, side), tokens - side * side


def entries(options: argparse.Namespace) -> Iterator[Entry]:
    """Compile the launches that the options select, one after another."""
    every = options.all
    targets = options.target or (TARGETS if every else JUDGED_TARGETS)
    dtypes = [DTYPES[name] for name in options.dtype or (DTYPES if every else ["bf16"])]
    dims = options.head_dim or (HEAD_DIMS if every else [64])
    widths = options.width or (WIDTHS if every else [768])
    shapes = options.shape or [(p.num_keys, p.num_prompts) for p in PROBLEMS]
    kernels = {
        family: [name for name in KERNELS[family] if name in options.kernel]
        for family in options.family
    }
    for target in targets:
        for dtype in dtypes:
            for dim in dims:
                of_shape = [AttentionProblem(n, p, dim, dtype) for n, p in shapes]
                for kernel in kernels.get("attention", ()):
                    for problem in of_shape:
                        yield attention_entry(kernel, problem, target)
                for kernel in kernels.get("plain", ()) if dtype != torch.float32 else ():
                    for problem in of_shape:
                        for prompt_queries in (False, True):
                            yield plain_entry(kernel, problem, target, prompt_queries)
            for width in widths:
                for kernel in kernels.get("experts", ()):
                    for n, p in shapes:
                        grid, prefix = patch_grid(n)
                        of_grid = ExpertProblem(grid, p, width, dtype, prefix)
                        yield expert_entry(kernel, of_grid, target)
                for kernel in kernels.get("rows", ()):
                    channels = 4 * width if kernel in ACTIVATION_KERNELS else width
                    yield row_entry(kernel, RowProblem(channels, dtype), target)
                if kernels.get("heads"):
                    yield heads_entry(HeadsProblem(width, dtype), target)
            for kernel in kernels.get("windows", ()):
                for windowed in window_report.problems(kernel):
                    if kernel in window_report.launched(windowed._replace(dtype=dtype)):
                        yield window_entry(kernel, windowed._replace(dtype=dtype), target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: Command-line arguments; those of the process if None.

    Returns:
        1 if a limit does not hold, else 0.
    """
    command = parser()
    options = command.parse_args(arguments)
    if options.output and options.output.exists():
        command.error(f"--output {options.output} exists: name another file or remove it")
    if not any(set(KERNELS[family]) & set(options.kernel) for family in options.family):
        command.error(f"no kernel {', '.join(options.kernel)} in {', '.join(options.family)}")
    if "experts" in options.family and set(KERNELS["experts"]) & set(options.kernel):
        try:
            for tokens, _ in options.shape or ():
                patch_grid(tokens)
        except ValueError as error:
            command.error(f"--shape: {error}, or --family without experts")
    print(TITLE, LEGEND, "", header(), sep="\n", flush=True)
    done = []
    for entry in entries(options):
        done.append(entry)
        print(format_entry(entry), flush=True)
    attention = [entry for entry in done if entry.family.endswith("attention")]
    if {entry.family for entry in attention} == {"attention", "plain attention"}:
        print("", COMPARISON, "", comparison(attention), sep="\n")
    over = sum(not verdict.holds for entry in done for verdict in entry.judged)
    print(f"\n{over} figures over their limits." if over else "\nEvery limit holds.")
    if no_limits():
        print(f"Only shared memory was judged: {no_limits()}.")
    if options.output:
        write_csv(options.output, [row for entry in done for row in csv_rows(entry)])
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
