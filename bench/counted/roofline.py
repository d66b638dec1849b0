"""FLOP, bytes and launches of a training step, counted; and its time on named GPUs, modelled.

    python -m bench.counted.roofline [--model M] [--batch B] [--prompts P ...] [--dtype bfloat16]
        [--gpu NAME ...] [--host CSV] [--measured CSV] [--output CSV]

One row per provider of `bench.providers.models` that supports the model, by the formula of
`bench.counted.step_model`. Nothing is timed here: the host's time comes from a results file of
`bench.host`, by default that of the newest torch in bench/results. Each row says whether host or
device bounds it.

A step is forward, cross-entropy and backward, without the optimizer, which takes the same time for
all prompted providers. Every launch reads and writes device memory: hits in L2 are not modelled.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.compare.cases import STEP
from bench.counted import fusion
from bench.counted.gpus import ASSUMPTION_FIELDS, DEFAULT, GPUS, Assumptions, Gpu, gpu_of
from bench.counted.step_model import (
    Case,
    HostTimes,
    Modelled,
    case_ops,
    modelled_case,
    providers_of,
    work,
)
from bench.counted.trace import KINDS
from bench.host import page as host_page
from bench.providers.models import COMPILED, CUDNN, OURS, PROVIDERS, PUBLISHED
from vpt_fast.analysis.activation_memory import DTYPES

BASELINES = ("concat", "concat_compiled", "keys_concat", "keys_concat_compiled")
"""Providers that ours is compared with in the second table, as far as they support the model."""

DEEP = "vpt-deep"

MEASURED_FIELDS = ("model", "batch", "prompts", "dtype", "provider", "device", "p50_ms")


def assumption_lines(gpus: Sequence[Gpu], assumed: Assumptions, hosts: HostTimes) -> list[str]:
    """Return the assumptions, one line each."""
    known = hosts.known
    shares = {gpu.name: assumed.attention or gpu.attention for gpu in gpus}
    return [
        "Counted: FLOP, bytes, launches. Modelled: every time. Nothing was run on a GPU.",
        "A step is forward, cross-entropy and backward, without the optimizer.",
        *(
            f"{gpu.name}: published peaks {gpu.tensor:g} TFLOP/s (bf16, dense), {gpu.fp32:g} "
            f"(fp32 without TF32), {gpu.bandwidth:,.0f} GB/s"
            for gpu in gpus
        ),
        f"Assumed efficiencies: products {assumed.gemm:.0%} of the peak, memory "
        f"{assumed.memory:.0%} of the bandwidth, attention "
        + ", ".join(f"{share:.0%} of the peak on {name}" for name, share in shares.items()),
        f"Host time of an eager step: measured by bench.host on {known['device']} with torch "
        f"{known['torch']}, launches doing nothing, in proportion to the blocks; plus an assumed "
        f"{assumed.driver_us:g} us per launch in the driver. One replay of a CUDA graph, assumed: "
        f"{assumed.replay_us:g} us. Gap between kernels, in a graph too: {assumed.gap_us:g} us",
        "Each launch moves each byte once through device memory; hits in L2 are not modelled.",
        "Only products of matrices have FLOP; passes over memory are bound by their bytes.",
        f"Compiled providers: {fusion.NAME}; of the host only the driver's launches.",
        "PyTorch's fused attention: arguments and results only, without its fp32 sums of dQ.",
        f"{PUBLISHED}: fp32 without TF32, attention as separate products and memory passes.",
    ]


def table(
    cases: Sequence[Case], gpus: Sequence[Gpu], assumed: Assumptions, hosts: HostTimes
) -> list[dict[str, str]]:
    """Return rows of counted work and modelled times, one per case."""
    rows = []
    for case in cases:
        done = work(case_ops(case))
        row = {
            **{name: str(value) for name, value in case._asdict().items()},
            "dtype": "float32" if case.provider == PUBLISHED else case.dtype,
            "launches_counted": str(done.launches),
        }
        for kind in KINDS[:2]:
            row[f"{kind}_gflop_counted"] = f"{done.flop[kind] / 1e9:.1f}"
        for kind in KINDS:
            row[f"{kind}_mb_counted"] = f"{done.nbytes[kind] / 1e6:.1f}"
        for gpu in gpus:
            times = modelled_case(case, gpu, assumed, hosts)
            row[f"{gpu.name}_eager_ms_modelled"] = f"{times.eager:.2f}"
            row[f"{gpu.name}_eager_bound_by_modelled"] = times.eager_bound
            row[f"{gpu.name}_graph_ms_modelled"] = f"{times.graph:.2f}"
            row[f"{gpu.name}_graph_bound_by_modelled"] = times.graph_bound
        rows.append(row)
    return rows


def figures_by_provider(
    ours: Case, gpu: Gpu, assumed: Assumptions, hosts: HostTimes
) -> dict[str, dict[str, float]]:
    """Return figures of vpt_fast and of the baselines, by quantity and provider.

    FLOP in 10^9, bytes in 10^6, times (modelled) in milliseconds.
    """
    found: dict[str, dict[str, float]] = {}
    for provider in (OURS, *(n for n in BASELINES if n in providers_of(ours.model))):
        case = ours._replace(provider=provider)
        done, times = work(case_ops(case)), modelled_case(case, gpu, assumed, hosts)
        figures = {
            "GEMM GFLOP, counted": done.flop["gemm"] / 1e9,
            "attention GFLOP, counted": done.flop["attention"] / 1e9,
            "GEMM MB, counted": done.nbytes["gemm"] / 1e6,
            "attention MB, counted": done.nbytes["attention"] / 1e6,
            "elementwise MB, counted": done.nbytes["elementwise"] / 1e6,
            "launches, counted": done.launches,
            f"{gpu.name} eager ms, modelled": times.eager,
            f"{gpu.name} graph ms, modelled": times.graph,
        }
        for quantity, value in figures.items():
            found.setdefault(quantity, {})[provider] = value
    return found


class MeasuredStep(NamedTuple):
    """Measured time of a step, with the time modelled for it, in milliseconds."""

    case: Case
    gpu: Gpu
    measured: float
    modelled: Modelled


def measured_steps(
    path: Path, assumed: Assumptions, hosts: HostTimes
) -> tuple[list[MeasuredStep], list[str]]:
    """Return measured rows with their modelled times, and the devices without known peaks.

    Of a results file of `bench.gpu` they are the VPT-Deep steps that have a time. A provider that
    prefers cuDNN's attention is modelled like the one that does not; those without a model are left
    out.

    Raises:
        ValueError: If a column is missing, or a value is invalid.
    """
    found, unknown = [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [f for f in MEASURED_FIELDS if f not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        for row in reader:
            others = {row.get("bench") or STEP, row.get("method") or DEEP} - {STEP, DEEP}
            provider = CUDNN.get(row["provider"], row["provider"])
            compiled = provider in COMPILED and provider not in PROVIDERS
            if others or compiled or not row["p50_ms"]:
                continue
            gpu = gpu_of(row["device"])
            if gpu is None:
                unknown.append(row["device"])
                continue
            case = Case(
                row["model"], int(row["batch"]), int(row["prompts"]), row["dtype"], provider
            )
            times = modelled_case(case, gpu, assumed, hosts)
            found.append(MeasuredStep(case, gpu, float(row["p50_ms"]), times))
    return found, list(dict.fromkeys(unknown))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _times(row: dict[str, str], gpu: Gpu) -> str:
    times = (
        f"{row[f'{gpu.name}_{mode}_ms_modelled']} {row[f'{gpu.name}_{mode}_bound_by_modelled']}"
        for mode in ("eager", "graph")
    )
    return " / ".join(dict.fromkeys(times))


def _print_table(rows: Sequence[dict[str, str]], gpus: Sequence[Gpu]) -> None:
    print(
        f"\n{'':26}{'GFLOP, counted':>18}{'MB, counted':>29}{'launches,':>10}"
        "  ms, modelled, and what bounds them: eager / graph, or one value if equal"
    )
    heads = "".join(f"{gpu.name:>28}" for gpu in gpus)
    print(
        f"{'p':>4} {'provider':21}{'GEMM':>8}{'attention':>10}{'GEMM':>8}{'attention':>10}"
        f"{'elementw.':>11}{'counted':>10}{heads}"
    )
    for row in rows:
        figures = [float(row[f"{kind}_gflop_counted"]) for kind in KINDS[:2]]
        moved = [float(row[f"{kind}_mb_counted"]) for kind in KINDS]
        times = "".join(f"{_times(row, gpu):>28}" for gpu in gpus)
        print(
            f"{row['prompts']:>4} {row['provider']:21}{figures[0]:8,.0f}{figures[1]:10,.0f}"
            f"{moved[0]:8,.0f}{moved[1]:10,.0f}{moved[2]:11,.0f}{row['launches_counted']:>10}{times}"
        )


def _print_figures(ours: Case, gpu: Gpu, assumed: Assumptions, hosts: HostTimes) -> None:
    print(
        f"\n{ours.model}, batch {ours.batch}, {ours.prompts} prompts, {ours.dtype}: {OURS}, and "
        "its change relative to each baseline"
    )
    names = [name for name in BASELINES if name in providers_of(ours.model)]
    print(f"{'':26}{OURS:>10}" + "".join(f"{name:>22}" for name in names))
    for quantity, values in figures_by_provider(ours, gpu, assumed, hosts).items():
        mine = values[OURS]
        others = (f"{values[n]:,.1f} ({mine / values[n] - 1:+.0%})" for n in names)
        print(f"{quantity:26}{mine:10,.1f}" + "".join(f"{text:>22}" for text in others))


def _print_measured(path: Path, assumed: Assumptions, hosts: HostTimes) -> None:
    found, unknown = measured_steps(path, assumed, hosts)
    print(f"\nMeasured ({path.name}) and modelled, milliseconds:")
    for row in found:
        case = row.case
        print(
            f"  {row.gpu.name:9} {case.model} batch {case.batch} prompts {case.prompts:3} "
            f"{case.dtype} {case.provider:21} measured {row.measured:9.2f}  modelled eager "
            f"{row.modelled.eager:9.2f} ({row.modelled.eager_bound}) graph "
            f"{row.modelled.graph:9.2f}  measured / modelled "
            f"{row.measured / row.modelled.eager:.2f}, {row.measured / row.modelled.graph:.2f}"
        )
    for device in unknown:
        print(f"  left out: no published peaks here for {device!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=_positive, default=64)
    parser.add_argument("--prompts", type=_positive, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--gpu", nargs="+", choices=tuple(GPUS), default=list(DEFAULT))
    parser.add_argument(
        "--host", type=Path, help="results of bench.host; default: those of the newest torch"
    )
    parser.add_argument("--measured", type=Path, help=f"CSV with {', '.join(MEASURED_FIELDS)}")
    parser.add_argument("--output", type=Path, help="CSV of the table; must not exist")
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=float, default=field.default,
            help="assumption; default %(default)s" + (" (the GPU's)" * (field.default is None)),
        )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and write the first one as CSV if requested."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.exists():
        parser.error(f"{options.output} exists; give --output a new name")
    gpus = [GPUS[name] for name in options.gpu]
    try:
        assumed = Assumptions(**{name: getattr(options, name) for name in ASSUMPTION_FIELDS})
        hosts = HostTimes(options.host or host_page.latest())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(*assumption_lines(gpus, assumed, hosts), sep="\n")
    print(f"\n{options.model}, batch {options.batch}, {options.dtype}")
    ours = [
        Case(options.model, options.batch, prompts, options.dtype, OURS)
        for prompts in options.prompts
    ]
    try:
        cases = [case._replace(provider=name) for case in ours for name in providers_of(case.model)]
        rows = table(cases, gpus, assumed, hosts)
        _print_table(rows, gpus)
        for case in ours:
            _print_figures(case, GPUS["H100"] if "H100" in options.gpu else gpus[0], assumed, hosts)
        if options.measured is not None:
            _print_measured(options.measured, assumed, hosts)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    if options.output is not None:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
