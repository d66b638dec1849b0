"""Static report of the prompt attention kernels: their machine code, judged without a GPU.

    python -m bench.kernel_report [--target 80 90 gfx942] [--kernel forward] [--output report.csv]

Every launch is compiled as the launcher would launch it. Registers, spills, shared memory and
occupancy are the compiler's; cycles are modelled from the instructions and published rates, as
`bench.figures` defines them. Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpt_fast.kernels.plan import AttentionProblem

from bench.figures import PIPES
from bench.limits import PROBLEMS, Verdict, verdicts
from bench.multiprocessor import AMD_SHARED_BLOCK, MULTIPROCESSORS
from bench.offline import Architecture
from bench.problems import KERNELS
from bench.report import LaunchReport, launch_report

TITLE = "Static figures, modelled from machine code and published rates; nothing was run or timed."
LEGEND = """\
launch  issue cycles of the whole launch per useful 1,048,576 MMA FLOP (padding, prologue, epilogue)
useful  part of the matrix work that the problem needs
loops   SM cycles of each pipe per iteration of one block, and issue cycles per 1,048,576 MMA FLOP;
        narrow tiles are counted over the usual tiles that they take the place of"""

_HEAD = "{:19}{:8}{:>5}{:>5}  {:18}{:>6}{:>7}{:>6}{:>7}{:>9}{:>10}{:>8}{:>8}"
_LOOP = "    {:15}{:>6}{:>7}{:>7}" + "{:>8}" * len(PIPES) + "{:>11}"


def architecture_name(architecture: Architecture) -> str:
    """sm_90 for 90; an AMD architecture's own name."""
    return f"sm_{architecture}" if isinstance(architecture, int) else architecture


def _cell(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def _tile(report: LaunchReport) -> str:
    """Sizes of the launch's tile: rows of queries x rows of keys, and of the narrower tiles."""
    sizes = report.launch.constexprs
    narrow = sizes.get("BLOCK_MIX", sizes.get("BLOCK_TAIL"))
    return f"{sizes['BLOCK_M']}x{sizes['BLOCK_N']}" + (f", {narrow}" if narrow else "")


def format_report(report: LaunchReport, judged: Sequence[Verdict]) -> str:
    """A launch as lines of text: the kernel, its loops, and the limits that do not hold."""
    figures, launch = report.figures, report.launch
    binary = figures.binary
    lines = [
        _HEAD.format(
            report.kernel,
            architecture_name(report.architecture),
            report.problem.num_keys,
            report.problem.num_prompts,
            _tile(report),
            launch.num_warps,
            launch.num_stages,
            binary.registers,
            binary.spill_bytes,
            binary.shared,
            _cell(figures.blocks_per_sm),
            _cell(report.useful_fraction, ".0%"),
            _cell(report.issue_cycles),
        )
    ]
    for name, loop in report.loops.items():
        pipes = [_cell(loop.cycles[pipe]) for pipe in PIPES]
        lines.append(
            _LOOP.format(
                name,
                _cell(loop.line),
                launch.trips[name],
                loop.instructions,
                *pipes,
                _cell(report.loop_cycles(name)),
            )
        )
    return "\n".join([*lines, *over_the_limit(judged)])


def over_the_limit(judged: Sequence[Verdict]) -> list[str]:
    """A line for each limit that does not hold."""
    return [
        f"    OVER THE LIMIT  {verdict.figure}: {verdict.value}, limit {verdict.limit}"
        for verdict in judged
        if not verdict.holds
    ]


def header() -> str:
    """The two rows of column names of `format_report`."""
    first = _HEAD.format(
        "kernel", "target", "N", "p", "tile", "warps", "stages", "regs", "spills", "shared",
        "blocks/SM", "useful", "launch",
    )  # fmt: skip
    return first + "\n" + _LOOP.format("loop", "line", "trips", "instr", *PIPES, "per unit")


def csv_rows(report: LaunchReport, judged: Sequence[Verdict]) -> list[dict[str, Any]]:
    """One row per loop of a launch (one in all where no loop was read), for a CSV file."""
    figures, launch = report.figures, report.launch
    common = {
        "kind": "static, modelled",
        "kernel": report.kernel,
        "target": architecture_name(report.architecture),
        "tokens": report.problem.num_keys,
        "prompts": report.problem.num_prompts,
        "head_dim": report.problem.head_dim,
        "dtype": str(report.problem.dtype).removeprefix("torch."),
        "tile": _tile(report),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "registers": figures.binary.registers,
        "spill_bytes": figures.binary.spill_bytes,
        "shared_bytes": figures.binary.shared,
        "blocks_per_sm": figures.blocks_per_sm,
        "occupancy": figures.occupancy,
        "useful_fraction": report.useful_fraction,
        "launch_issue_cycles_per_unit": report.issue_cycles,
        "over_the_limit": "; ".join(v.figure for v in judged if not v.holds),
    }
    rows = [
        {
            **common,
            "loop": name,
            "line": loop.line,
            "trips": launch.trips[name],
            "instructions": loop.instructions,
            "mma_flop": loop.flop,
            **{f"{pipe}_cycles": loop.cycles[pipe] for pipe in PIPES},
            "loop_issue_cycles_per_unit": report.loop_cycles(name),
            "mix": " ".join(f"{kind}={count}" for kind, count in loop.mix.most_common()),
        }
        for name, loop in report.loops.items()
    ]
    return rows or [common]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows under the union of their columns.

    Raises:
        FileExistsError: if `path` exists.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _architecture(text: str) -> Architecture:
    """An architecture from the command line: 90, sm_90 or gfx942."""
    number = text.removeprefix("sm_")
    if number.isdigit() and int(number) in MULTIPROCESSORS:
        return int(number)
    if text in AMD_SHARED_BLOCK:
        return text
    known = ", ".join(map(str, (*MULTIPROCESSORS, *AMD_SHARED_BLOCK)))
    raise argparse.ArgumentTypeError(f"unknown target {text!r}: use {known}")


def _problem(text: str) -> AttentionProblem:
    """A shape from the command line: N,p or N,p,d."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"shape {text!r}: use N,p or N,p,d such as 197,50,64")
    return AttentionProblem(*sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report.

    Args:
        arguments: of the command line; those of the process if None.

    Returns:
        1 if a limit does not hold, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=TITLE)
    parser.add_argument("--target", nargs="+", type=_architecture, default=[80, 90])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--shape", nargs="+", type=_problem, default=list(PROBLEMS))
    parser.add_argument("--output", type=Path, help="CSV file to write; must not exist")
    options = parser.parse_args(arguments)
    if options.output and options.output.exists():
        parser.error(f"--output {options.output} exists: name another file or remove it")

    print(TITLE, LEGEND, "", header(), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    over = 0
    for architecture in options.target:
        for kernel in options.kernel:
            for problem in options.shape:
                report = launch_report(kernel, problem, architecture)
                judged = verdicts(report)
                over += sum(not verdict.holds for verdict in judged)
                rows += csv_rows(report, judged)
                print(format_report(report, judged), flush=True)
    return conclude(over, rows, options.output)


def conclude(over: int, rows: Sequence[dict[str, Any]], output: Path | None) -> int:
    """Print whether all limits hold, write `rows` if asked to, and return the exit code."""
    print(f"\n{over} figures over their limits." if over else "\nEvery limit holds.")
    if output:
        write_csv(output, rows)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
