"""Profile of a step: the device's kernels by time, and the share of time in which any ran."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from bench.compare.cases import DTYPES, Case
from bench.compare.rounds import work
from bench.gpu.device import Device
from bench.gpu.outcome import Emit
from bench.providers.models import OURS, provide

COLUMNS = (
    "provider", "what", "name", "calls", "us", "share", "tflops", "gb_per_s", "shapes",
)  # fmt: skip
"""Columns of the file. Calls and microseconds are those of one step, `share` is of the device's
busy time, and rates of matrix products follow from the shapes of their operands and results.
"""

_STEPS = 3
_SHOWN = 12
_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1)}
"""PyTorch's matrix products, and the indices of the arguments that are multiplied."""

Span = tuple[float, float]


@dataclass(frozen=True)
class ProfileJob:
    """Profile of a provider's step in `profile.csv`; vpt_fast's also as a trace for Perfetto.

    Attributes:
        case: Step to profile.
        provider: Provider to profile.
        folder: Folder of the files.
        seconds: Estimated seconds.
    """

    case: Case
    provider: str
    folder: str
    seconds: float = 12.0

    def __str__(self) -> str:
        return f"profile of {self.provider}, {self.case}"

    def run(self, device: Device, emit: Emit) -> None:
        """Time the kernels of the step, write their rows and emit the longest ones."""
        model = self.case.build().to(DTYPES[self.case.dtype]).to(device.name)
        module = provide(self.provider, model, self.case.settings(), self.case.memory)
        run = work(self.case, module, device.name)
        for _ in range(_STEPS):
            run()
        cuda = device.name == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profiler(activities=activities, record_shapes=True) as found:
            for _ in range(_STEPS):
                run()
            if cuda:
                torch.cuda.synchronize()
        rows = [*kernel_rows(found, cuda), *product_rows(found, cuda)]
        self._write(rows)
        if self.provider == OURS:
            found.export_chrome_trace(str(Path(self.folder) / "trace.json.gz"))
        for line in self._lines(found, rows, cuda):
            emit("message", line)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        path = Path(self.folder) / "profile.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows({**row, "provider": self.provider} for row in rows)

    def _lines(self, found: Any, rows: Sequence[dict[str, Any]], cuda: bool) -> list[str]:
        lines = []
        spans = spans_of(found) if cuda else []
        if spans:
            busy, whole = busy_time(spans)
            lines.append(
                f"{len(spans) / _STEPS:.0f} launches a step, {whole / _STEPS / 1e3:.2f} ms, device "
                f"busy {busy / whole:.1%}"
            )
        for row in [r for r in rows if r["what"] != "product"][:_SHOWN]:
            lines.append(f"{row['us']:>9} us {row['share']:>6} {row['calls']:>5} x {row['name']}")
        for row in [r for r in rows if r["what"] == "product"][:4]:
            lines.append(
                f"{row['us']:>9} us  {row['tflops']} TFLOP/s  {row['gb_per_s']} GB/s  "
                f"{row['name']} {row['shapes']}"
            )
        return lines


def spans_of(found: Any) -> list[Span]:
    """Return start and end of everything that ran on the device, in microseconds."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    ]


def busy_time(spans: Sequence[Span]) -> tuple[float, float]:
    """Return how long any span lasted, and the time from the first start to the last end."""
    ordered = sorted(spans)
    busy, last = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy, last - ordered[0][0]


def kernel_rows(found: Any, cuda: bool) -> list[dict[str, Any]]:
    """Return the kernels (on a CPU, the operators) of one step, longest first."""
    times = []
    for entry in found.key_averages():
        on_device = getattr(entry, "device_type", None) == DeviceType.CUDA
        micros = entry.self_device_time_total if cuda else entry.self_cpu_time_total
        if micros and on_device == cuda:
            times.append((micros / _STEPS, entry.count / _STEPS, entry.key))
    total = sum(time for time, _, _ in times)
    return [
        {
            "what": "kernel" if cuda else "operator", "name": key[:160], "calls": f"{calls:g}",
            "us": f"{time:.1f}", "share": f"{time / total:.3f}",
        }
        for time, calls, key in sorted(times, reverse=True)
    ]  # fmt: skip


def product_rows(found: Any, cuda: bool) -> list[dict[str, Any]]:
    """Return PyTorch's matrix products of one step by shape, with rates, longest first."""
    rows = []
    for entry in found.key_averages(group_by_input_shape=True):
        factors = _PRODUCTS.get(entry.key)
        micros = entry.device_time_total if cuda else entry.cpu_time_total
        if factors is None or not micros:
            continue
        a, b = (entry.input_shapes[index] for index in factors)
        batch = a[0] if len(a) == 3 else 1
        m, k, n = a[-2], a[-1], b[-1]
        seconds = micros / entry.count / 1e6
        rows.append(
            (micros / _STEPS, {
                "what": "product", "name": entry.key, "calls": f"{entry.count / _STEPS:g}",
                "us": f"{micros / _STEPS:.1f}", "shapes": f"{batch} x {m} x {k} x {n}",
                "tflops": f"{2 * batch * m * k * n / seconds / 1e12:.4g}",
                "gb_per_s": f"{2 * batch * (m * k + k * n + m * n) / seconds / 1e9:.4g}",
            })
        )  # fmt: skip
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
