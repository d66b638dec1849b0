"""The types of jobs: comparisons, checks, and others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from bench.compare.cases import Case
from bench.compare.collect import Row
from bench.gpu.device import Device
from bench.gpu.jobs.checks import KernelCase
from bench.gpu.outcome import Emit
from bench.gpu.results.record import FIELDS
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BankAttentionCase
from bench.providers.bank_models import BankModelCase
from bench.providers.experts import ExpertCase


@dataclass(frozen=True)
class KernelCheck:
    """Check of an operator, without times; in its own dtype if it has one."""

    case: KernelCase
    dtype: str | None = None

    def __str__(self) -> str:
        case, heads = self.case, ""
        if isinstance(case, AttentionCase | BankAttentionCase):
            heads = f"-heads {case.heads}x{case.head_dim}"
        return f"check {case}{heads}" + (f"-{self.dtype}" if self.dtype else "")


@dataclass(frozen=True)
class CeilingsJob:
    """Measurement of the device's ceilings."""

    def __str__(self) -> str:
        return "ceilings: one large product, one large copy"


@dataclass(frozen=True)
class FactsJob:
    """Name of the device, and the versions that results depend on."""

    def __str__(self) -> str:
        return "device and versions"


@runtime_checkable
class RunnableJob(Protocol):
    """A job that runs itself on the device.

    Attributes:
        seconds: Estimated seconds.
    """

    @property
    def seconds(self) -> float: ...

    def run(self, device: Device, emit: Emit) -> None:
        """Run the job, and emit its results."""
        ...


Comparison = Case | AttentionCase | ExpertCase | BankAttentionCase | BankModelCase
Job = Comparison | KernelCheck | CeilingsJob | FactsJob | RunnableJob


def case_columns(job: Comparison | KernelCheck, dtype: str) -> Row:
    """Return the columns that identify what a row measured."""
    row = {"kind": "measured", "dtype": dtype}
    if isinstance(job, KernelCheck):
        return {**row, "dtype": job.dtype or dtype, "bench": "check", "model": str(job)}
    if isinstance(job, Case):
        row |= {"bench": job.work}
    elif isinstance(job, AttentionCase):
        row |= {"bench": "attention"}
    elif isinstance(job, ExpertCase):
        row |= {"bench": "experts", "method": "vapt"}
    elif isinstance(job, BankAttentionCase):
        row |= {"bench": "attention of many tasks"}
    elif isinstance(job, BankModelCase):
        row |= {"bench": "inference of many tasks"}
    row |= {name: value for name, value in vars(job).items() if name in FIELDS}
    return row
