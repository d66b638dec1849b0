"""Chooses the tiles of the attention kernels, from static figures or from measured times.

    python -m bench.tiles.tune --head-dim 64 --target 80 90           # print choices only
    python -m bench.tiles.tune --head-dim 64 --target 80 90 --write   # and write the launch table
    python -m bench.tiles.tune --measure times.csv           # on a GPU: time the candidates
    python -m bench.tiles.tune --times times.csv --write     # choose from measured times

Without `--times`, candidates are compiled without a GPU and chosen by the rules of
`bench.tiles.candidates`: issue cycles are modelled, nothing is run or timed. With it, only entries
with measured times are chosen, and later runs without it leave them unchanged. Nothing is tuned
when a model runs: the kernels read `kernels/attention/launch_table.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.machine_code.multiprocessor import AMD_SHARED_BLOCK, MULTIPROCESSORS
from bench.machine_code.offline import Architecture
from bench.tiles.candidates import DTYPES, Score, candidates, choose, current, finalists, score
from bench.tiles.table_file import TABLE_FILE, write_table
from bench.tiles.times import best_of, measure, read_times, write_times
from vpt_fast.kernels.attention.launch_table import MEASURED, TABLE
from vpt_fast.kernels.attention.tiles import ARCHITECTURES, HEAD_DIMS, KERNELS, Choice, Key

_LINE = "  {:>5}{:>6}{:>7}{:>8}{:>7}{:>8}{:>11}{:>9}  {}"


def choose_statically(key: Key) -> Choice:
    """Compile the candidates of an entry, print them, and return the best one."""
    now = current(key)
    scores = [score(key, choice) for choice in finalists(key, candidates(key))]
    best = choose(scores)
    print(
        _LINE.format("rows", "step", "warps", "stages", "regs", "spills", "occupancy", "issue", "")
    )
    for scored in scores:
        notes = [scored.reason, *scored.broken]
        notes += ["chosen"] * (scored is best) + ["in the table now"] * (scored.choice == now)
        cycles, occupancy = scored.issue_cycles, scored.occupancy
        print(
            _LINE.format(
                *scored.choice,
                scored.registers or "-",
                "-" if scored.reason and not scored.registers else scored.spill_bytes,
                f"{occupancy:.0%}" if occupancy else "-",
                "-" if cycles is None else f"{cycles:.0f}",
                ", ".join(filter(None, notes)),
            )
        )
    print(f"  {_margin(best, next(s for s in scores if s.choice == now))}", flush=True)
    return best.choice


def _margin(best: Score, now: Score) -> str:
    """Describe the benefit of the choice over the table's current one."""
    if best.choice == now.choice:
        return "no change"
    if now.reason:
        return f"the table's choice cannot run: {now.reason}"
    words = []
    if now.spill_bytes != best.spill_bytes:
        words.append(f"{now.spill_bytes} to {best.spill_bytes} bytes spilled")
    if now.issue_cycles and best.issue_cycles:
        words.append(f"{best.issue_cycles / now.issue_cycles - 1:+.1%} issue cycles (modelled)")
    return ", ".join(words) or "a tile that the rules prefer"


def choose_by_times(key: Key, times: Mapping[Choice, float]) -> Choice:
    """Print the measured times of an entry's candidates, and return the fastest."""
    best, now = best_of(times), current(key)
    for choice, milliseconds in sorted(times.items(), key=lambda item: (item[1], item[0])):
        notes = ["chosen"] * (choice == best) + ["in the table now"] * (choice == now)
        print(f"  {choice}: {milliseconds:.4f} ms, measured  {', '.join(notes)}")
    return best


def _architecture(text: str) -> Architecture:
    """Parse an architecture from the command line: 90, sm_90 or gfx942."""
    number = text.removeprefix("sm_")
    if number.isdigit() and int(number) in MULTIPROCESSORS:
        return int(number)
    if text in AMD_SHARED_BLOCK:
        return text
    known = ", ".join(map(str, (*MULTIPROCESSORS, *AMD_SHARED_BLOCK)))
    raise argparse.ArgumentTypeError(f"unknown target {text!r}: use {known}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiles.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--target", nargs="+", type=_architecture, help="architectures; default: all"
    )
    parser.add_argument("--times", type=Path, help="CSV file of measured times to choose from")
    parser.add_argument(
        "--measure", type=Path, help="CSV file to write on a GPU, for its own architecture"
    )
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=TABLE_FILE,
        metavar="FILE",
        help="write the launch table: the package's own, or another file",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, print and write.

    Args:
        arguments: Command-line arguments; those of the process if None.

    Returns:
        0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    keys: list[Key] = [
        (kernel, head_dim, dtype, target)
        for kernel, head_dim, dtype in itertools.product(
            options.kernel, options.head_dim, options.dtype
        )
        for target in options.target or ARCHITECTURES[dtype]
    ]
    if options.measure:
        if options.times or options.write:
            parser.error("--measure only measures: pass its file to --times in another run")
        if not torch.cuda.is_available():
            parser.error("--measure needs a GPU, and PyTorch sees none here: leave it out")
        if options.measure.exists():
            parser.error(f"--measure {options.measure} exists: name another file or remove it")
        write_times(options.measure, measure(keys))
        return 0
    measured: dict[Key, dict[Choice, float]] = {}
    if options.times:
        try:
            measured = read_times(options.times)
        except (OSError, ValueError) as error:
            parser.error(f"--times: {error}")
        keys = [key for key in keys if key in measured]
        if not keys:
            parser.error(f"--times {options.times} has no time of the kernels that were asked for")

    chosen: dict[Key, Choice] = {}
    for key in keys:
        print("{}, {} channels, {}, {}".format(*key), flush=True)
        if key in measured:
            chosen[key] = choose_by_times(key, measured[key])
        elif key in MEASURED:
            print("  chosen from measured times; left alone")
        else:
            chosen[key] = choose_statically(key)
    changed = sum(TABLE.get(key) != choice for key, choice in chosen.items())
    print(f"\n{changed} of {len(keys)} entries change.")
    if options.write:
        write_table(options.write, {**TABLE, **chosen}, {*MEASURED, *(set(measured) & set(keys))})
        print(f"Written to {options.write}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
