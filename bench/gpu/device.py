"""What a benchmark asks of its device: a timer, peak memory, CUDA graphs, and whether it is well.

On a CPU there is a timer, and nothing else: it keeps no count of memory and has no graphs.
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
"""Work that is waiting for the device while its clock and power are read."""

WARM_UP = 3
"""Steps before a capture: PyTorch's notes on CUDA graphs, "Whole-network capture"."""


class CpuDevice:
    """A CPU. Its memory is not counted, so nothing has to be collected before it is."""

    name = "cpu"
    timer: Timer = CpuTimer()

    def allocated(self) -> int:
        """Bytes of tensors; 0 here."""
        return 0

    def peak(self, run: Run) -> int | None:
        """The most bytes of tensors while `run` runs; None: not counted."""
        return None

    def capture(self, run: Run, parameters: Iterable[Tensor]) -> CapturedGraph | None:
        """None: there are no graphs."""
        return None

    def host_seconds(self, run: Run) -> float | None:
        """Seconds until the last launch is made; None: the host is the device."""
        return None

    def load(self, run: Run, seconds: float) -> dict[str, str]:
        """Clock and power under load; nothing here."""
        return {}

    def usable(self) -> bool:
        """Whether the device still computes."""
        return True

    def release(self) -> None:
        """Nothing is left to free."""


class CudaDevice:
    """The current CUDA device. Nothing of it runs without one."""

    name = "cuda"
    timer: Timer = CudaTimer()

    def allocated(self) -> int:
        """Bytes of tensors."""
        return torch.cuda.memory_allocated()

    def peak(self, run: Run) -> int | None:
        """The most bytes of tensors while `run` runs."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def capture(self, run: Run, parameters: Iterable[Tensor]) -> CapturedGraph | None:
        """A graph of a function's launches."""
        return CapturedGraph(run, parameters)

    def host_seconds(self, run: Run) -> float | None:
        """Median seconds until the last launch is made, the device being idle at its start."""
        taken = []
        for _ in range(HOST_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return median(taken)

    def load(self, run: Run, seconds: float) -> dict[str, str]:
        """Clock (MHz) and power (W) of the device while it works; what it does not emit is absent.

        Args:
            run: what it does.
            seconds: that this takes.
        """
        for _ in range(max(1, min(int(LOAD_SECONDS / max(seconds, 1e-6)), 500))):
            run()
        found = {}
        for name, ask, unit in (
            ("sm_mhz", torch.cuda.clock_rate, 1), ("watts", torch.cuda.power_draw, 1000),
        ):  # fmt: skip
            # NVML is missing, or not allowed to say.
            try:
                found[name] = f"{ask() / unit:.0f}"
            except Exception:
                continue
        torch.cuda.synchronize()
        return found

    def usable(self) -> bool:
        """Whether the device still computes: after a fault of a kernel it never does."""
        try:
            torch.randn(8, device="cuda").sum().item()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        """Free what is not used."""
        gc.collect()
        torch.cuda.empty_cache()


Device = CpuDevice | CudaDevice
DEVICES: dict[str, type[Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}


class CapturedGraph:
    """The launches of a function as a CUDA graph.

    Args:
        run: reads the same tensors whenever it is called, and gives gradients anew.
        parameters: whose gradients it gives.

    Attributes:
        wanted: results of the last call before the capture.
        held: the results that replays overwrite.
    """

    def __init__(self, run: Run, parameters: Iterable[Tensor]) -> None:
        trained = list(parameters)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # On the capture's stream: libraries' handles are made per stream, and never in a capture.
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
        """Launch it all."""
        self._graph.replay()


def results(returned: Any, parameters: Iterable[Tensor]) -> Results:
    """What a function returned and the gradients it gave, by number."""
    tensors = [t for t in tree_leaves(returned) if isinstance(t, Tensor)]
    tensors += [p.grad for p in parameters if p.grad is not None]
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def replay_error(graph: Any) -> float:
    """How far a replay's results are from eager ones: the largest relative error.

    The graph's results are overwritten before, so that a replay that computes nothing shows.
    """
    # Results of inference may only be written to where they may be made.
    with torch.inference_mode():
        for tensor in graph.held.values():
            tensor.fill_(float("nan"))
    graph.replay()
    have, want = (
        {name: tensor.detach().double().cpu() for name, tensor in values.items()}
        for values in (graph.held, graph.wanted)
    )
    return largest_error(have, want)[0]
