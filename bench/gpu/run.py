"""The GPU benchmark: correctness, times, memory and rates on a CUDA GPU, in one command.

    python -m bench.gpu [--minutes 9] [--stage correctness ...] [--cases quick] [--output FOLDER]
    python -m bench.gpu --count FOLDER/NAME.csv     # add FLOP, bytes, rates, plots (no GPU)
    python -m bench.gpu --device cpu                # the same code on a tiny model

It runs from the source tree, installed or not, and ends within its time even if something hangs.
Every row and line is written at once. Every provider is checked against fp64 on the device before
it is timed (`bench.compare.correctness`). Times are measured with CUDA events in interleaved
rounds; `graph_p50_ms` is a replay of the same step as a CUDA graph, `host_ms` the host's time until
its last launch. Ceilings are measured in the same run. Peak memory is that of a provider's own
model, images and step: other memory on the device is subtracted. Jobs that there was no time for
are printed. The exit status is 1 if a result was wrong or nothing was measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.compare.collect import RESULTS
from bench.compare.facts import facts
from bench.gpu.jobs.cases import TINY, Plan
from bench.gpu.jobs.job import FactsJob
from bench.gpu.results.counts import add_counts
from bench.gpu.results.record import Record
from bench.gpu.session import DTYPE, Budget, Session
from bench.gpu.stages import STAGES, Run, run_stages
from bench.gpu.worker import InProcess, Worker
from bench.providers.models import EAGER, GPU_PROVIDERS

_END_SECONDS = 20.0
"""Seconds after the time limit at which the process is killed, wherever it is."""

TRIAL = Path("bench_output")
"""Folder for the results of `--device cpu`, which are of no further use."""

NO_GPU = (
    "bench.gpu: PyTorch finds no CUDA GPU here. This benchmark measures one: run it on a machine "
    "with a GPU and a CUDA (or ROCm) build of PyTorch. `--device cpu` runs the same code on a tiny "
    "model, and `make bench` measures this CPU."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=_positive(float), default=9.0, help="default 9")
    parser.add_argument(
        "--stage", nargs="+", choices=("all", *STAGES), default=["all"],
        help="stages to run, in this order; default all",
    )  # fmt: skip
    parser.add_argument("--cases", choices=("full", "quick"), default="full")
    parser.add_argument(
        "--model", help=f"model of most steps, by its timm name; default {Plan.model}"
    )
    parser.add_argument(
        "--batch", type=_positive(int), help=f"images per step; default {Plan.batch}"
    )
    parser.add_argument("--prompts", type=_positive(int), nargs="+", help="prompts per block")
    parser.add_argument("--providers", nargs="+", choices=GPU_PROVIDERS, help="default: all")
    parser.add_argument(
        "--output", type=Path, help=f"folder; default bench/results, of a trial {TRIAL}"
    )
    parser.add_argument(
        "--count", type=Path, metavar="CSV",
        help="measure nothing: count FLOP and bytes of a results file's rows, and draw it",
    )  # fmt: skip
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    return parsed


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan(full=options.cases == "full")
    if options.device == "cpu":
        plan = replace(plan, model=TINY, batch=2, prompts=(3, 5), providers=EAGER, trial=True)
    return replace(
        plan,
        model=options.model or plan.model,
        batch=options.batch or plan.batch,
        prompts=tuple(options.prompts or plan.prompts),
        providers=tuple(options.providers or plan.providers),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write results; or count and draw.

    Returns:
        0; 1 if a result was wrong or nothing was measured; 2 if there is no GPU.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.count is not None:
        try:
            print(*add_counts(options.count), sep="\n")
        except (OSError, ValueError) as error:
            parser.error(f"--count: {error}")
        return 0
    cuda = options.device == "cuda"
    if cuda:
        _watch(60 * options.minutes + _END_SECONDS)
    budget = Budget(60 * options.minutes)
    if cuda and not torch.cuda.is_available():
        faulthandler.cancel_dump_traceback_later()
        print(NO_GPU, file=sys.stderr)
        return 2
    record = Record(options.output or (RESULTS if cuda else TRIAL))
    session = Session((Worker if cuda else InProcess)(options.device, DTYPE), record)
    try:
        measure(Run(session, _plan(options), options.device), options.stage, budget)
    finally:
        session.runner.close()
        if cuda:
            faulthandler.cancel_dump_traceback_later()
    _report(session)
    return 1 if session.wrong or not session.outcomes else 0


def _watch(seconds: float) -> None:
    """Exit this process after some seconds, even if the driver blocks it."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def measure(run: Run, stages: Sequence[str], budget: Budget) -> None:
    """Run the stages.

    Args:
        run: State that the stages share.
        stages: Names of stages, or "all".
        budget: Time for all of them.
    """
    names = list(STAGES) if "all" in stages else list(stages)
    if names != ["warm"]:
        run.session.run([FactsJob()], budget)
        record = run.session.record
        if not record.facts:  # the device does not answer; record what is known without it
            unnamed = {"device": "unnamed GPU", "cuda": str(torch.version.cuda)}
            record.facts = {**facts(gpu=False), **unnamed}
        record.line(", ".join(f"{name} {value}" for name, value in record.facts.items()))
    run_stages(run, names, budget)


def _report(session: Session) -> None:
    say = session.record.line
    if session.ceilings is not None:
        say(
            f"Ceilings, measured: {session.ceilings.tflops:.4g} TFLOP/s (bf16 product), "
            f"{session.ceilings.gb_per_s:.4g} GB/s (copy, read and written)"
        )
    for title, lines in (
        ("Skipped, there was no time", session.skipped),
        ("WRONG", session.wrong),
    ):
        if lines:
            say("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))
    if session.rows:
        say(f"FLOP, bytes and a picture: python -m bench.gpu --count {session.record.path}")
        say(str(session.record.path))
