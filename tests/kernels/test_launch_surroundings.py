"""Repeated launches follow streams, devices, hooks and threads, as newly built ones would."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton
from support.kernels.recording_driver import LAUNCHES, RecordingDriver, compared, recording
from test_launch_plan import BF16, EPS, normalise
from torch import Tensor

from vpt_fast.kernels.rowwise import activation
from vpt_fast.kernels.rowwise.residual_norm import residual_norm_launch
from vpt_fast.kernels.runtime import launch_plan


@pytest.fixture
def driver() -> Iterator[RecordingDriver]:
    with recording() as found:
        yield found


def test_the_current_stream(driver: RecordingDriver) -> None:
    x, weight = torch.randn(2, 5, 64).to(BF16), torch.randn(64).to(BF16)
    streams = (0, 7, 5, 7)
    for stream in streams:
        driver.stream = stream
        normalise(x, x.clone(), weight)
    assert [launch.stream for launch in LAUNCHES.take()] == [*streams]
    with compared():
        driver.stream = 9
        normalise(x, x.clone(), weight)


class _OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]


def test_the_device_of_the_tensors(driver: RecordingDriver, monkeypatch: Any) -> None:
    """Launches go to the tensors' device and its stream, whichever device is current."""

    class Entered:
        def __init__(self, device: Any) -> None:
            self.index = (
                torch.device("cuda", device).index if isinstance(device, int) else device.index
            )

        def __enter__(self) -> None:
            self.before, driver.device = driver.device, self.index

        def __exit__(self, *_: Any) -> None:
            driver.device = self.before

    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(RecordingDriver, "get_current_stream", lambda self, device: 100 + device)
    x = torch.randn(2, 5, 64).to(BF16).as_subclass(_OnGpu)
    y, statistics = x.clone(), torch.empty(2, 2, 5).as_subclass(_OnGpu)
    tensors = (x, None, None, None, None, None, y, statistics)
    launch = launch_plan.Launcher()
    for current in (1, 0, 1, 0):
        driver.device = current
        launch(tensors, residual_norm_launch, EPS, None)
        assert driver.device == current
    found = LAUNCHES.take()
    assert not launch.is_new and len(found) == 4 and len(set(found)) == 1
    assert (found[0].device, found[0].stream) == (1, 101)


def test_hooks_that_were_added_later_are_called(driver: RecordingDriver, monkeypatch: Any) -> None:
    x, weight = torch.randn(2, 5, 64).to(BF16), torch.randn(64).to(BF16)
    runtime, seen = triton.knobs.runtime, []

    def note(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    def replayed(count: int) -> None:
        seen.clear()
        with compared() as found:
            normalise(x, x.clone(), weight)
        # The launch that is built anew is seen too.
        assert found.replayed == 1 and seen == ["residual_norm_kernel"] * (2 * count)

    normalise(x, x.clone(), weight)
    replayed(0)
    runtime.launch_enter_hook.add(note)
    try:
        replayed(1)
        runtime.launch_exit_hook.add(note)
        replayed(2)
    finally:
        runtime.launch_enter_hook.remove(note)
        runtime.launch_exit_hook.remove(note)
    replayed(0)
    monkeypatch.setattr(runtime, "launch_enter_hook", note)  # in place of Triton's chain
    replayed(1)


def test_a_hook_that_was_there_before_is_called(driver: RecordingDriver, monkeypatch: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", seen.append)
    spec: Any = importlib.util.find_spec(launch_plan.__name__)
    imported_later = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported_later)
    launch = imported_later.Launcher()
    x = torch.randn(2, 5, 64).to(BF16)
    tensors = (x, None, None, None, None, None, x.clone(), torch.empty(2, 2, 5))
    for _ in range(3):
        launch(tensors, residual_norm_launch, EPS, None)
    assert not launch.is_new and len(seen) == 3


def test_threads(driver: RecordingDriver) -> None:
    """Several threads use one launcher at once, each with its own tensors."""
    errors: list[BaseException] = []
    weight = torch.randn(64).to(BF16)

    def work(seed: int) -> None:
        try:
            for _ in range(20):
                x = torch.randn(2, 5 + seed % 2, 64).to(BF16)
                normalise(x, x.clone(), weight)
                h = torch.randn(2, 5, 64).to(BF16)
                activation.activation(h, weight, "gelu")
        except BaseException as error:
            errors.append(error)

    with compared() as found:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and found.replayed >= 100


def test_one_thread_compiles_at_a_time(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [0], [0]

    def run(launches: Any, device: torch.device) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return original(launches, device)

    original = launch_plan.run
    monkeypatch.setattr(launch_plan, "run", run)

    def work(rows: int) -> None:
        normalise(torch.randn(2, rows, 72).to(BF16), None, torch.randn(72).to(BF16))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(101, 109)))
    assert most == [1]
