"""Metrics of the server, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from examples.serve.batcher import BatchDone

PREFIX = "vpt_serve"


class Metrics:
    """Counters of an application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._predictions = self._counter("predictions", "Images that were answered.", "task")
        self._refusals = self._counter("refusals", "Requests that were not answered.", "reason")
        self._seconds = self._histogram(
            "request_seconds",
            "From the end of the upload to the answer.",
            (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self._images = self._histogram(
            "batch_images", "Images of a batch.", (1, 2, 4, 8, 16, 32, 64, 128)
        )
        self._tasks = self._histogram(
            "batch_tasks", "Different tasks of a batch.", (1, 2, 4, 8, 16, 32)
        )
        self._batch_seconds = self._histogram(
            "batch_seconds",
            "Time that the bank takes for a batch.",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Register a value that is computed when the metrics are read."""
        Gauge(f"{PREFIX}_{name}", text, registry=self.registry).set_function(value)

    def answered(self, task: str, seconds: float) -> None:
        """Count a prediction."""
        self._predictions.labels(task).inc()
        self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that got no prediction."""
        self._refusals.labels(reason).inc()

    def batch(self, done: BatchDone) -> None:
        """Count a batch."""
        self._images.observe(done.images)
        self._tasks.observe(done.tasks)
        self._batch_seconds.observe(done.seconds)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, [label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)
