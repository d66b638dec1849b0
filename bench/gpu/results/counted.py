"""Counted FLOP and bytes of what was timed, and its modelled time.

The only module of the GPU benchmark that uses `bench.counted.trace` and `bench.counted.step_model`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.compare.cases import DTYPES, STEP, Case
from bench.compare.collect import Row
from bench.counted import fusion, step_model
from bench.counted.gpus import Assumptions, gpu_of
from bench.counted.step_trace import CLASSES, step_ops
from bench.counted.trace import Op, traced
from bench.host import page as host_page
from bench.providers import attention as attention_providers
from bench.providers.attention import AttentionCase
from bench.providers.models import COMPILED, PUBLISHED, base


class Counted(NamedTuple):
    """FLOP and bytes, counted; milliseconds in eager mode and as a CUDA graph, modelled."""

    flop: int
    nbytes: int
    eager_ms: float | None = None
    graph_ms: float | None = None


def count(case: object, provider: str, dtype: str, device: str) -> Counted | None:
    """Count a provider's step, or attention alone.

    Args:
        case: Case that was timed.
        provider: One of `bench.providers.models`; compiled ones are counted after ideal fusion.
        dtype: Dtype of attention; a `Case` has its own.
        device: Name of the device; a time is modelled if its peaks are known.

    Returns:
        None for what cannot be traced: inference, and experts alone.
    """
    ops = _ops(case, provider, dtype)
    if ops is None:
        return None
    done = step_model.work(ops)
    flop, nbytes = sum(done.flop.values()), sum(done.nbytes.values())
    gpu = gpu_of(device)
    if gpu is None or not isinstance(case, Case):
        return Counted(flop, nbytes)
    hosts = step_model.HostTimes(host_page.latest())
    host = step_model.host_ms(hosts, case.model, provider, case.method)
    times = step_model.modelled(ops, gpu, Assumptions(), host)
    return Counted(flop, nbytes, times.eager, times.graph)


def _ops(case: object, provider: str, dtype: str) -> list[Op] | None:
    eager = base(provider)
    if isinstance(case, AttentionCase):
        with FakeTensorMode():
            inputs = case.inputs(DTYPES[dtype])
            with traced() as ops:
                attention_providers.run(attention_providers.IMPLEMENTATIONS[eager], *inputs)
    elif isinstance(case, Case) and case.work == STEP and case.classes == CLASSES:
        kind = "float32" if provider == PUBLISHED else case.dtype
        ops = step_ops(
            case.model, eager, case.settings(), case.batch, DTYPES[kind],
            image_size=case.image_size,
        )  # fmt: skip
    else:
        return None
    return fusion.fused(ops) if provider in COMPILED else ops


def rates(row: Row, counted: Counted) -> Row:
    """Return the achieved rates of a row that has a time: counted work over measured time."""
    seconds = float(row["p50_ms"]) / 1e3
    return {
        "tflops": f"{counted.flop / seconds / 1e12:.4g}",
        "gb_per_s": f"{counted.nbytes / seconds / 1e9:.4g}",
    }
