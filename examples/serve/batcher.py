"""Thread that runs the bank on batches of waiting images of any tasks."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.serve.refusals import Refusal
from examples.serve.settings import Settings
from vpt_fast.bank import BankTask, PromptBank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Logits (classes,) of an image, fp32 on the CPU, and the size of its batch."""

    logits: Tensor
    batch_size: int


@dataclass(frozen=True, eq=False)
class _Waiting:
    image: Tensor
    task: BankTask
    since: float
    future: Future[Prediction] = field(default_factory=Future)


@dataclass(frozen=True)
class BatchDone:
    """Computed batch: numbers of images and of distinct tasks, and seconds."""

    images: int
    tasks: int
    seconds: float


class Batcher:
    """Bounded queue of images, and the thread that empties it.

    A batch begins when there is an image and the bank is free. It takes up to `max_batch` waiting
    images, and waits for others until `max_wait` seconds after the first one's arrival.

    Args:
        bank: Bank that computes the predictions.
        settings: Limits, of which `max_queue`, `max_batch` and `max_wait` are used.
        device: Device of the bank's model.
        dtype: Dtype of the bank's model.
        on_batch: Function called in the thread after every computed batch.
    """

    def __init__(
        self,
        bank: PromptBank,
        settings: Settings,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_batch: Callable[[BatchDone], None] | None = None,
    ) -> None:
        self._bank = bank
        self._settings = settings
        self._device, self._dtype = torch.device(device), dtype
        self._on_batch = on_batch
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name="bank", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current batch began; 0 between batches."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, image: Tensor, task: BankTask) -> Future[Prediction]:
        """Add an image to the queue, which it leaves if its future is cancelled while it waits.

        Args:
            image: Image (C, H, W) after the task's transform.
            task: Task of the bank.

        Returns:
            Future of the prediction.

        Raises:
            Refusal: If the queue is full or closed.
        """
        waiting = _Waiting(image, task, time.monotonic())
        with self._changed:
            if self._closing:
                raise Refusal(503, "shutting_down", "The server is shutting down.")
            if len(self._queue) >= self._settings.max_queue:
                raise Refusal(
                    503,
                    "queue_full",
                    f"{self._settings.max_queue} images are waiting already. Try again soon.",
                )
            self._queue.append(waiting)
            self._changed.notify_all()
        waiting.future.add_done_callback(lambda future: self._forget(waiting, future))
        return waiting.future

    def close(self, seconds: float = 10.0) -> None:
        """Stop accepting images, compute the queued ones, and refuse those that are late.

        Args:
            seconds: Time to wait for the thread.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
        refusal = Refusal(503, "shutting_down", "The server shut down before this image's turn.")
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(refusal)

    def _forget(self, waiting: _Waiting, future: Future[Prediction]) -> None:
        if not future.cancelled():
            return
        with self._changed:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            self._began = time.monotonic()
            try:
                self._answer(batch)
            except Exception:  # every waiting request gets an answer, and the thread survives
                _fail(batch)
            self._began = None

    def _next(self) -> list[_Waiting] | None:
        """Return the images of the next batch; None when the queue is closed and empty."""
        settings = self._settings
        with self._changed:
            while True:
                if not self._queue:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                left = self._queue[0].since + settings.max_wait - time.monotonic()
                if len(self._queue) >= settings.max_batch or left <= 0 or self._closing:
                    break
                self._changed.wait(left)
            count = min(len(self._queue), settings.max_batch)
            batch = [self._queue.popleft() for _ in range(count)]
        return [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]

    def _answer(self, batch: list[_Waiting]) -> None:
        present = [waiting for waiting in batch if self._is_current(waiting)]
        try:
            if present:
                self._compute(present)
        except Exception:
            names = {waiting.task.name for waiting in present}
            if len(names) == 1:
                _fail(present)
                return
            logger.exception("a batch of %d tasks failed; each is tried alone", len(names))
            # If one task is at fault, the others get their predictions.
            for name in names:
                self._answer([waiting for waiting in present if waiting.task.name == name])

    def _is_current(self, waiting: _Waiting) -> bool:
        """Return whether the image's task is still the same; refuse the image otherwise."""
        name = waiting.task.name
        try:
            same = self._bank.task(name) is waiting.task
        except ValueError:
            gone = f"The task {name!r} was removed while the image waited."
            waiting.future.set_exception(Refusal(404, "unknown_task", gone))
            return False
        if not same:
            other = f"The task {name!r} was replaced while the image waited. Try again."
            waiting.future.set_exception(Refusal(503, "task_replaced", other))
        return same

    def _compute(self, batch: list[_Waiting]) -> None:
        began, tasks = time.monotonic(), [waiting.task.name for waiting in batch]
        images = torch.stack([waiting.image for waiting in batch]).to(self._device, self._dtype)
        with torch.inference_mode():
            logits = self._bank(images, tasks)
            # One copy from the device for the whole batch.
            flat = torch.cat([one.float() for one in logits]).cpu()
        parts = flat.split([len(one) for one in logits])
        done = BatchDone(len(batch), len(set(tasks)), time.monotonic() - began)
        if self._on_batch is not None:
            self._on_batch(done)
        for waiting, part in zip(batch, parts, strict=True):
            waiting.future.set_result(Prediction(part, len(batch)))


def _fail(batch: list[_Waiting]) -> None:
    logger.exception("a batch of %d images failed", len(batch))
    for waiting in batch:
        if not waiting.future.done():
            message = "The server could not compute the prediction."
            waiting.future.set_exception(Refusal(500, "batch_failed", message))
