"""A training step's work, counted, and its time on a GPU, modelled.

Counts come from a trace on fake tensors (`bench.counted.trace`). Times follow from the peaks and
assumptions of `bench.counted.gpus`, and from the host's time that `bench.host` measured:

    time of a launch  max(FLOP / (peak * efficiency), bytes / (bandwidth * efficiency)) + gap
    device            sum over launches
    host              measured per step, in proportion to its blocks, + launches * driver's time
    eager step        max(device, host)
    step in a graph   max(device, one replay)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from bench.counted import fusion
from bench.counted.gpus import Assumptions, Gpu
from bench.counted.step_trace import step_ops
from bench.counted.trace import KINDS, Op
from bench.host import page as host_page
from bench.host.cases import DEPTH, HostCase
from bench.providers.models import COMPILED, PROVIDERS, PUBLISHED, WITHOUT, base
from vpt_fast import VPTDeep
from vpt_fast.analysis.activation_memory import DTYPES
from vpt_fast.models.tuned import blocks_of

DEVICE, HOST = "device", "host"


class Case(NamedTuple):
    """One training step."""

    model: str
    batch: int
    prompts: int
    dtype: str
    provider: str


class Work(NamedTuple):
    """Counted work of a step, by kind: FLOP, bytes read and written, launches."""

    flop: dict[str, int]
    nbytes: dict[str, int]
    launches: int


class Modelled(NamedTuple):
    """Modelled milliseconds of a step, eager and as a CUDA graph, and what bounds each."""

    eager: float
    graph: float
    eager_bound: str
    graph_bound: str


class HostTimes:
    """The host's milliseconds of a step, without the driver's, as `bench.host` measured them.

    Args:
        path: Results file of `bench.host`.

    Raises:
        ValueError: If the file is not one, or lacks a provider's step.
    """

    def __init__(self, path: Path) -> None:
        rows = host_page.read(path)
        self.known: Mapping[str, str] = rows[0]
        self._steps = {
            row["subject"]: float(row["least_ms"]) for row in rows if row["part"] == "whole"
        }

    def step(self, model: str, provider: str, method: str = "vpt-deep") -> float:
        """Return the milliseconds of an eager provider's step.

        The time is taken to be proportional to the number of blocks.
        """
        kind, depth = blocks_of_model(model)
        case = str(HostCase(kind, provider, method))
        if case not in self._steps:
            raise ValueError(f"the results of bench.host have no {case}; measure them again")
        return self._steps[case] * depth / DEPTH


@functools.cache
def blocks_of_model(model: str) -> tuple[str, int]:
    """Return the kind of a timm model, as `bench.host` names it, and its number of blocks.

    Raises:
        ValueError: If it has neither blocks nor stages of them.
    """
    with torch.device("meta"):
        built = timm.create_model(model)
    if not hasattr(built, "blocks") and not hasattr(built, "layers"):
        raise ValueError(f"{model} is a {type(built).__name__}; give a ViT or a SwinTransformer")
    return "vit" if hasattr(built, "blocks") else "swin", len(blocks_of(built))


def providers_of(model: str) -> tuple[str, ...]:
    """Return the providers that support a timm model: Swin has no "keys_concat"."""
    if blocks_of_model(model)[0] == "vit":
        return PROVIDERS
    return tuple(n for n in PROVIDERS if COMPILED.get(n, n) != "keys_concat")


@functools.cache
def case_ops(case: Case) -> tuple[Op, ...]:
    """Return the launches of a step; those of compiled providers after ideal fusion.

    "published" is traced in fp32, whatever the dtype of the case.

    Raises:
        ValueError: If the provider or dtype is unknown, or the model does not support prompts.
    """
    if case.provider not in PROVIDERS:
        raise ValueError(f"provider is {case.provider!r}; choose one of {', '.join(PROVIDERS)}")
    if case.dtype not in DTYPES:
        raise ValueError(f"dtype is {case.dtype!r}; choose one of {', '.join(DTYPES)}")
    dtype = "float32" if case.provider == PUBLISHED else case.dtype
    eager = COMPILED.get(case.provider, case.provider)
    ops = step_ops(case.model, eager, VPTDeep(case.prompts), case.batch, DTYPES[dtype])
    return tuple(fusion.fused(ops) if case.provider in COMPILED else ops)


def work(ops: Iterable[Op]) -> Work:
    """Return the counted work of launches."""
    flop, nbytes, launches = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), 0
    for op in ops:
        flop[op.kind] += op.flop
        nbytes[op.kind] += op.nbytes
        launches += op.launches
    return Work(flop, nbytes, launches)


def host_ms(hosts: HostTimes, model: str, provider: str, method: str = "vpt-deep") -> float:
    """Return the host's milliseconds of a step, without the driver's.

    Compiled code is assumed to cost none, as its fusion is assumed to be ideal. "published", which
    splits attention into several operators, is assumed to cost what concatenation does; the number
    of launches shows the difference. The choice of PyTorch's attention kernel costs no host time.
    """
    if provider in COMPILED:
        return 0.0
    eager = "concat" if provider == PUBLISHED else base(provider)
    return hosts.step(model, eager, "vpt-deep" if eager == WITHOUT else method)


def modelled(ops: Iterable[Op], gpu: Gpu, assumed: Assumptions, host: float) -> Modelled:
    """Return the modelled time of a step (see the module).

    Args:
        ops: Launches of the step.
        gpu: GPU to model.
        assumed: Assumptions.
        host: Milliseconds of the host, without the driver's; see `host_ms`.
    """
    device = launching = 0.0  # seconds
    attention = gpu.attention if assumed.attention is None else assumed.attention
    for op in ops:
        part = attention if op.kind == "attention" else assumed.gemm
        peak = gpu.fp32 if op.fp32 else gpu.tensor
        compute = op.flop / (peak * 1e12 * part)
        memory = op.nbytes / (gpu.bandwidth * 1e9 * assumed.memory)
        device += max(compute, memory) + op.launches * assumed.gap_us * 1e-6
        launching += op.launches * assumed.driver_us * 1e-6
    device, host = 1e3 * device, host + 1e3 * launching
    replay = 1e-3 * assumed.replay_us
    return Modelled(
        max(device, host), max(device, replay),
        HOST if host > device else DEVICE, HOST if replay > device else DEVICE,
    )  # fmt: skip


def modelled_case(case: Case, gpu: Gpu, assumed: Assumptions, hosts: HostTimes) -> Modelled:
    """Return the modelled time of a case's step."""
    return modelled(case_ops(case), gpu, assumed, host_ms(hosts, case.model, case.provider))
