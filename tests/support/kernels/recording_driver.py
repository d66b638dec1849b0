"""A driver that records launches instead of launching them.

The arguments of a repeated launch can be compared with those of a newly built launch for the same
tensors, without a GPU. As with `bench.host.null_driver`, on which it is based, Triton compiles for
sm_90, and vpt_fast uses its kernels for tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor

from bench.host.null_driver import NullDriver, null_driver
from vpt_fast.kernels.runtime import launch_plan
from vpt_fast.kernels.runtime.launch import Launch, run
from vpt_fast.kernels.runtime.launch_plan import Launcher
from vpt_fast.ops.block import sites


class Recorded(NamedTuple):
    """One launch.

    Attributes:
        kernel: Name of the kernel.
        launcher: Identity of the kernel's specialisation.
        grid: Programs along the three axes.
        device: Index of the current device.
        stream: Handle of the stream.
        values: Arguments that are not compile-time values, in order; addresses for tensors.
    """

    kernel: str
    launcher: int
    grid: tuple[int, int, int]
    device: int
    stream: int
    values: tuple[Any, ...]


class _Launches(threading.local):
    """Launches that the current thread recorded."""

    def __init__(self) -> None:
        self.found: list[Recorded] = []

    def take(self) -> list[Recorded]:
        found, self.found = self.found, []
        return found


LAUNCHES = _Launches()


class RecordingLauncher:
    """Replacement of the compiled launcher of one kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._name = metadata.name
        self._passed = [kind != "constexpr" for kind in src.signature.values()]

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        values = tuple(
            value.data_ptr() if hasattr(value, "data_ptr") else value
            for value, passed in zip(arguments, self._passed, strict=True)
            if passed
        )
        device = triton.runtime.driver.active.get_current_device()
        LAUNCHES.found.append(Recorded(self._name, id(self), (x, y, z), device, stream, values))


class RecordingDriver(NullDriver):
    """Driver whose device and stream can be set."""

    launcher_cls = RecordingLauncher

    def __init__(self) -> None:
        # Neither a real device nor the null driver's: compiled kernels cache their launcher.
        self.device, self.stream = -2, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return self.stream


def _forget() -> None:
    """Clear the launch plans, which belong to one driver."""
    launch_plan.launcher.cache_clear()
    sites.planned_sites.cache_clear()


@contextlib.contextmanager
def recording() -> Iterator[RecordingDriver]:
    """Record launches inside in `LAUNCHES`."""
    driver = RecordingDriver()
    with null_driver():
        triton.runtime.driver.set_active(driver)
        _forget()
        LAUNCHES.take()
        try:
            yield driver
        finally:
            _forget()


class Compared:
    """Counts of compared launches.

    Attributes:
        replayed: Calls of launchers that had a plan.
        built: Calls that built their launches.
        kernels: Names of the kernels that were launched from plans.
    """

    def __init__(self) -> None:
        self.replayed, self.built = 0, 0
        self.kernels: set[str] = set()


@contextlib.contextmanager
def compared() -> Iterator[Compared]:
    """Compare every launch of a launcher inside with a newly built one for the same tensors."""
    planned, result = Launcher.__call__, Compared()

    def both(self: Launcher, tensors: Any, build: Any, *others: Any) -> None:
        built: list[Any] = []

        def watched(*arguments: Any) -> Any:
            built.append(build(*arguments))
            return built[0]

        LAUNCHES.take()
        planned(self, tensors, watched, *others)
        found = LAUNCHES.take()
        again = build(*tensors, *others)
        device = next(t.device for t in tensors if isinstance(t, Tensor))
        run([again] if isinstance(again, Launch) else again, device)
        expected = LAUNCHES.take()
        assert found == expected
        result.built += bool(built)
        result.replayed += not built
        result.kernels.update(launch.kernel for launch in found if not built)

    with mock.patch.object(Launcher, "__call__", both):
        yield result
