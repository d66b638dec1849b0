"""What a benchmark needs of its device: timer, peak memory, CUDA graphs, and a health check.

A CPU has a timer only: its memory is not counted, and it has no graphs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.compare.correctness import Results, largest_error
from bench.compare.device_timer import CpuTimer, CudaTimer, Run, Timer

HOST_ROUNDS = 9
LOAD_SECONDS = 0.15
"""Seconds of work to queue while the clock and power are read."""

WARM_UP = 3
"""Steps before a capture, as in "Whole-network capture" of PyTorch's notes on CUDA graphs."""


class CpuDevice:
    """A CPU. Its memory is not counted, so nothing is collected before measuring."""

    name = "cpu"
    timer: Timer = CpuTimer()

    def allocated(self) -> int:
        """Return 0: memory is not counted."""
        return 0

    def peak(self, run: Run) -> int | None:
        """Return None: memory is not counted."""
        return None

    def capture(self, run: Run, parameters: Iterable[Tensor]) -> CapturedGraph | None:
        """Return None: there are no graphs."""
        return None

    def host_seconds(self, run: Run) -> float | None:
        """Return None: the host is the device."""
        return None

    def load(self, run: Run, seconds: float) -> dict[str, str]:
        """Return an empty dict: clock and power are not read."""
        return {}

    def usable(self) -> bool:
        """Return True."""
        return True

    def release(self) -> None:
        """Do nothing: there is no cache to free."""


class CudaDevice:
    """The current CUDA device."""

    name = "cuda"
    timer: Timer = CudaTimer()

    def allocated(self) -> int:
        """Return the bytes of allocated tensors."""
        return torch.cuda.memory_allocated()

    def peak(self, run: Run) -> int | None:
        """Return the peak bytes of allocated tensors while `run` runs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def capture(self, run: Run, parameters: Iterable[Tensor]) -> CapturedGraph | None:
        """Record a function's launches as a graph."""
        return CapturedGraph(run, parameters)

    def host_seconds(self, run: Run) -> float | None:
        """Return the median seconds until the last launch, starting from an idle device."""
        taken = []
        for _ in range(HOST_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return median(taken)

    def load(self, run: Run, seconds: float) -> dict[str, str]:
        """Return the clock (MHz) and power (W) under load, as far as NVML reports them.

        Args:
            run: Work to queue.
            seconds: Seconds that one run takes.
        """
        for _ in range(max(1, min(int(LOAD_SECONDS / max(seconds, 1e-6)), 500))):
            run()
        found = {}
        for name, ask, unit in (
            ("sm_mhz", torch.cuda.clock_rate, 1), ("watts", torch.cuda.power_draw, 1000),
        ):  # fmt: skip
            # NVML may be missing, or not permitted to answer.
            try:
                found[name] = f"{ask() / unit:.0f}"
            except Exception:
                continue
        torch.cuda.synchronize()
        return found

    def usable(self) -> bool:
        """Return whether the device still computes; after a fault of a kernel it never does."""
        try:
            torch.randn(8, device="cuda").sum().item()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        """Release unused memory."""
        gc.collect()
        torch.cuda.empty_cache()


Device = CpuDevice | CudaDevice
DEVICES: dict[str, type[Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}


class CapturedGraph:
    """Launches of a function as a CUDA graph.

    Args:
        run: Function that reads the same tensors at every call, and computes new gradients.
        parameters: Parameters whose gradients it computes.

    Attributes:
        wanted: Results of the last call before the capture.
        held: Results that replays overwrite.
    """

    def __init__(self, run: Run, parameters: Iterable[Tensor]) -> None:
        trained = list(parameters)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # On the capture's stream: library handles are created per stream, and not during a capture.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                result = run()
            self.wanted = {n: t.detach().clone() for n, t in results(result, trained).items()}
        torch.cuda.current_stream().wait_stream(stream)
        del result
        # So that gradients are allocated in the graph's own memory.
        for parameter in trained:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            result = run()
        self.held = results(result, trained)

    def replay(self) -> None:
        """Replay all launches."""
        self._graph.replay()


def results(returned: Any, parameters: Iterable[Tensor]) -> Results:
    """Return what a function returned and the gradients it computed, keyed by number."""
    tensors = [t for t in tree_leaves(returned) if isinstance(t, Tensor)]
    tensors += [p.grad for p in parameters if p.grad is not None]
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def replay_error(graph: Any) -> float:
    """Return the largest relative error of a replay's results against eager ones.

    The graph's results are overwritten first, so that a replay that computes nothing is detected.
    """
    # Inference tensors may only be written to in inference mode.
    with torch.inference_mode():
        for tensor in graph.held.values():
            tensor.fill_(float("nan"))
    graph.replay()
    have, want = (
        {name: tensor.detach().double().cpu() for name, tensor in values.items()}
        for values in (graph.held, graph.wanted)
    )
    return largest_error(have, want)[0]
