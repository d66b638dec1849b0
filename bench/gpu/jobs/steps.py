"""Checks of one training step as users run it: CUDA graph, DistributedDataParallel, torch.compile.

A graph and DistributedDataParallel run the same kernels as the step in eager PyTorch, and are
compared with it; compiled code rounds differently, and is compared with fp64 as every provider is.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bench.compare.cases import Case
from bench.compare.correctness import SLACK, Results, Truth, largest_error
from bench.compare.rounds import step
from bench.gpu.device import Device, replay_error
from bench.gpu.outcome import Emit
from bench.providers.models import OURS, provide

KINDS = ("graph", "parallel", "compile")

Found = tuple[float, float, str]
"""Error, largest error allowed, and what the error is measured against."""


@dataclass(frozen=True)
class StepCheck:
    """Check of one step of vpt_fast, without times.

    Attributes:
        case: Model and method.
        kind: "graph" for the replay of a CUDA graph, "parallel" for DistributedDataParallel in a
            group of one process, "compile" for torch.compile with the whole graph.
    """

    case: Case
    kind: str

    @property
    def seconds(self) -> float:
        """Estimated seconds."""
        return 40.0 if self.kind == "compile" else 6.0

    def __str__(self) -> str:
        return f"one step by {self.kind}, {self.case}"

    def run(self, device: Device, emit: Emit) -> None:
        """Run the step and compare it."""
        emit("running", (OURS,))
        found = self._compiled(device) if self.kind == "compile" else self._error(device)
        if found is None:
            emit("message", f"not on a {device.name}")
            return
        error, limit, truth = found
        row = {
            "kind": "measured", "bench": "check", "model": str(self), "dtype": self.case.dtype,
            "method": self.case.method, "prompts": self.case.prompts, "provider": OURS,
            "error": f"{error:.2g}", "rounds": 0,
        }  # fmt: skip
        if not error <= limit:
            row["note"] = f"wrong: {error:.1e} from {truth}, limit {limit:.1e}"
            emit("wrong", f"{self}: {row['note']}")
        emit("row", row)

    def _compiled(self, device: Device) -> Found:
        truth = Truth(self.case, device.name, whole=True)
        torch.compiler.reset()
        backend = "inductor" if device.name == "cuda" else "aot_eager"
        compiled: Any = torch.compile(truth.module(OURS, 0.0), fullgraph=True, backend=backend)
        check = truth.check(f"{OURS}_compiled", compiled)
        return check.error, check.limit, "fp64"

    def _error(self, device: Device) -> Found | None:
        """Return the error against the eager step; None where the device lacks such a step."""
        limit, truth = SLACK[self.case.dtype], "the step in eager PyTorch"
        model: Any = self.case.build().to(getattr(torch, self.case.dtype)).to(device.name)
        module = provide(OURS, model, self.case.settings())
        images, labels = self.case.inputs()
        given = images.to(device.name, next(module.parameters()).dtype), labels.to(device.name)
        wanted = _step(module, step(module, *given))
        if self.kind == "graph":
            trained = [p for p in module.parameters() if p.requires_grad]
            graph = device.capture(step(module, *given), trained)
            return None if graph is None else (replay_error(graph), limit, truth)
        with _group(device.name):
            parallel = DistributedDataParallel(module)
            error = largest_error(_step(module, step(parallel, *given)), wanted)[0]
        return error, limit, truth


def _step(module: nn.Module, run: Callable[[], torch.Tensor]) -> Results:
    """Return the loss and gradients of a step, by the module's own names."""
    found = {"loss": run()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return {name: value.detach().double().cpu().clone() for name, value in found.items()}


@contextlib.contextmanager
def _group(device: str) -> Iterator[None]:
    """Open a process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}",
        rank=0, world_size=1,
    )  # fmt: skip
    try:
        yield
    finally:
        distributed.destroy_process_group()
