"""Application: predictions for images of different tasks, computed in one batch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from examples.serve.batcher import Batcher
from examples.serve.gate import Admission, UploadGate
from examples.serve.metrics import Metrics
from examples.serve.refusals import Refusal, refuse
from examples.serve.settings import Settings
from examples.serve.uploads import prepare
from vpt_fast.bank import BankTask, PromptBank
from vpt_fast.train.common.ranking import most_probable
from vpt_fast.train.data.pictures import FORMATS

T = TypeVar("T")

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# A form has an image and two fields, with short names of file and task.
FORM_LIMITS: Any = {"max_files": 1, "max_fields": 8, "max_part_size": 4096}
REASONS = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed"}


class ClassProbability(BaseModel):
    """Class, and the probability that the image shows it."""

    name: str
    probability: float


class Answer(BaseModel):
    """Prediction: the most probable classes, in descending order."""

    task: str
    classes: list[ClassProbability]
    batch_size: int
    ms: float


class TaskInfo(BaseModel):
    """Task that images can be sent for."""

    name: str
    method: str
    num_classes: int
    multi_label: bool
    input_size: list[int]


class Limits(BaseModel):
    """Limits of an upload."""

    upload_bytes: int
    pixels: int
    formats: list[str]


class Tasks(BaseModel):
    """Tasks and limits of the server."""

    tasks: list[TaskInfo]
    limits: Limits


@dataclass(frozen=True)
class _Parts:
    bank: PromptBank
    settings: Settings
    batcher: Batcher
    decoders: ThreadPoolExecutor
    admission: Admission
    metrics: Metrics


def create_app(
    bank: PromptBank,
    settings: Settings | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FastAPI:
    """Build the application around a bank; tasks may be added and removed while it runs.

    Args:
        bank: Bank that computes the predictions.
        settings: Limits of the server.
        device: Device of the bank's model.
        dtype: Dtype of the bank's model.

    Returns:
        ASGI application, whose thread starts now and ends with its lifespan.
    """
    settings, metrics = settings or Settings(), Metrics()
    batcher = Batcher(bank, settings, device, dtype, metrics.batch)
    admission = Admission(settings.max_requests)
    decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
    parts = _Parts(bank, settings, batcher, decoders, admission, metrics)
    metrics.gauge("queue_images", "Images that wait for the bank.", lambda: batcher.waiting)
    metrics.gauge("requests", "Predictions in progress.", lambda: admission.inside)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, settings.request_seconds)
        decoders.shutdown(wait=False, cancel_futures=True)

    # FastAPI's own documentation page loads its script from another server.
    app = FastAPIOffline(
        title="vpt-fast", docs_url="/docs", redoc_url=None, lifespan=lifespan,
        favicon_url="static/icon.svg",
    )  # fmt: skip
    app.state.batcher = batcher
    app.add_middleware(
        UploadGate,
        path="/predict",
        admission=admission,
        settings=settings,
        respond=lambda refusal: _respond(refusal, metrics),
    )
    _add_errors(app, metrics)
    _add_predict(app, parts)
    _add_views(app, parts)
    return app


def _add_predict(app: FastAPI, parts: _Parts) -> None:
    settings = parts.settings

    @app.post("/predict", form_limits=FORM_LIMITS)
    async def predict(
        request: Request,
        image: UploadFile,
        task: Annotated[str, Form(max_length=200)],
        topk: Annotated[int, Form(ge=1)] = 5,
    ) -> Answer:
        """Return the `topk` most probable classes of an image (a file) for a task."""
        began, deadline = time.perf_counter(), _now() + settings.request_seconds
        try:
            entry = parts.bank.task(task)
        except ValueError as error:
            message = f"The server has no task {task!r}; GET /tasks lists them."
            raise Refusal(404, "unknown_task", message) from error
        gone = asyncio.ensure_future(_gone(request))
        try:
            decoded = parts.decoders.submit(prepare, image.file, entry.inputs, settings.max_pixels)
            pixels = await _first(decoded, gone, deadline)
            prediction = await _first(parts.batcher.submit(pixels, entry), gone, deadline)
        finally:
            gone.cancel()
        logits, several = prediction.logits, entry.multi_label
        found = most_probable(logits, entry.class_names, topk, several)
        seconds = time.perf_counter() - began
        parts.metrics.answered(task, seconds)
        return Answer(
            task=task,
            classes=[ClassProbability(name=name, probability=p) for name, p in found],
            batch_size=prediction.batch_size,
            ms=round(1000 * seconds, 3),
        )


def _add_views(app: FastAPI, parts: _Parts) -> None:
    bank, settings, batcher = parts.bank, parts.settings, parts.batcher

    @app.get("/tasks")
    async def tasks() -> Tasks:
        """Return the tasks, and the limits of an upload."""
        limits = Limits(
            upload_bytes=settings.max_upload_bytes,
            pixels=settings.max_pixels,
            formats=list(FORMATS),
        )
        return Tasks(tasks=[_info(entry) for entry in _entries(bank)], limits=limits)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Return the state of the server: 200, or 503 if its thread has ended."""
        state = {
            "status": "ok" if batcher.alive else "down",
            "worker_alive": batcher.alive,
            "worker_busy_seconds": round(batcher.busy_seconds, 3),
            "queue_images": batcher.waiting,
            "requests": parts.admission.inside,
            "tasks": len(bank.tasks),
        }
        return JSONResponse(state, 200 if batcher.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters and histograms for Prometheus."""
        return Response(parts.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(STATIC / "page.html", headers=headers)

    app.mount("/static", StaticFiles(directory=STATIC))


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _respond(error, metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        wrong = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
        return _respond(Refusal(422, "invalid_form", f"The form is wrong: {wrong}."), metrics)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # uvicorn logs the traceback, which the client does not get, and closes the connection.
        response = _respond(Refusal(500, "internal_error", "The server failed."), metrics)
        response.headers["Connection"] = "close"
        return response


def _respond(error: HTTPException, metrics: Metrics) -> Response:
    other = REASONS.get(error.status_code, "refused")
    reason = error.reason if isinstance(error, Refusal) else other
    metrics.refused(reason)
    return refuse(error.status_code, reason, str(error.detail), dict(error.headers or {}))


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(
    future: concurrent.futures.Future[T], gone: asyncio.Future[None], deadline: float
) -> T:
    """Return a future's result, unless the client leaves or the deadline passes first.

    Raises:
        Refusal: If either happens; the future is cancelled then.
    """
    result = asyncio.wrap_future(future)
    waited: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(
            waited, timeout=max(0.0, deadline - _now()), return_when=asyncio.FIRST_COMPLETED
        )
        if result.done():
            return result.result()
    finally:
        # Also cancels `future` if it has not begun; a queued image leaves the queue.
        result.cancel()
    if gone.done():
        raise Refusal(499, "client_gone", "The client went away.")
    raise Refusal(504, "timeout", "The server did not get to this image in time. Try again later.")


def _entries(bank: PromptBank) -> list[BankTask]:
    entries = []
    for name in bank.tasks:
        try:
            entries.append(bank.task(name))
        except ValueError:  # it has just been removed
            continue
    return entries


def _info(entry: BankTask) -> TaskInfo:
    return TaskInfo(
        name=entry.name,
        method=entry.method.name,
        num_classes=entry.num_classes,
        multi_label=entry.multi_label,
        input_size=list(entry.inputs["input_size"]),
    )
