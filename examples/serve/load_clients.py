"""Clients that overload a server and check its answers."""

from __future__ import annotations

import asyncio
import io
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import torch

from examples.serve.trial import picture
from examples.serve.uploads import prepare
from vpt_fast.bank import PromptBank
from vpt_fast.train.common.ranking import names_of, probabilities_of

TOLERANCE = 1e-4
"""Tolerance of probabilities; results of different batch sizes differ by rounding."""

MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)
CASES = (
    ((48, 40), "PNG"),
    ((32, 32), "BMP"),
    ((200, 150), "JPEG"),
    ((90, 300), "PNG"),
    ((64, 64), "WEBP"),
    ((640, 480), "JPEG"),
)


@dataclass(frozen=True)
class Case:
    """Request and its expected answer, unless the server refuses for lack of room.

    Attributes:
        kind: Name of the kind of request in the report.
        content: Body, as keyword arguments of an HTTP client.
        status: HTTP status of the answer.
        probabilities: Probabilities of the classes by name, if the answer is a prediction.
    """

    kind: str
    content: dict[str, Any]
    status: int = 200
    probabilities: dict[str, float] | None = None


@dataclass
class Tally:
    """Outcomes of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def good_cases(bank: PromptBank) -> list[Case]:
    """Return a request of every picture for every task, with the bank's answer for it alone."""
    cases = []
    for seed, (size, file_format) in enumerate(CASES):
        file = picture(seed, size, file_format)
        for task in bank.tasks:
            entry = bank.task(task)
            image = prepare(io.BytesIO(file), entry.inputs, 10**7)
            with torch.inference_mode():
                logits = bank(image[None], [task])[0]
            shares = probabilities_of(logits, entry.multi_label).tolist()
            names = names_of(entry.class_names, len(shares))
            content = {"files": {"image": file}, "data": {"task": task, "topk": len(names)}}
            probabilities = dict(zip(names, shares, strict=True))
            cases.append(Case("prediction", content, 200, probabilities))
    return cases


def bad_cases(task: str, max_upload_bytes: int) -> list[Case]:
    """Return invalid requests, each for another reason."""
    good, cut = picture(0), picture(1, (200, 150), "JPEG")
    form = {"task": task}
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    return [
        Case("unknown task", {"files": {"image": good}, "data": {"task": "none"}}, 404),
        Case("truncated image", {"files": {"image": cut[: len(cut) // 2]}, "data": form}, 422),
        Case("no image", {"files": {"image": b"not an image"}, "data": form}, 422),
        Case("oversized", {"files": {"image": bytes(max_upload_bytes + 1)}, "data": form}, 413),
        Case("malformed", {"content": b"--y\r\nnothing", "headers": boundary}, 400),
        Case("no task", {"files": {"image": good}}, 422),
    ]


async def press(
    address: str,
    good: Sequence[Case],
    bad: Sequence[Case],
    clients: int,
    seconds: float,
) -> Tally:
    """Send requests without pause, one per client at a time and at least one each.

    Args:
        address: Address of the server.
        good: Requests that get a prediction.
        bad: Invalid requests, of which one in ten is sent.
        clients: Number of concurrent clients.
        seconds: Time that the clients send requests.
    """
    tally = Tally()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        end = time.monotonic() + seconds
        watch = asyncio.create_task(_watch_memory(client, tally))
        asking = [_ask_until(end, client, good, bad, seed, tally) for seed in range(clients)]
        await asyncio.gather(*asking)
        watch.cancel()
    return tally


async def _watch_memory(client: httpx2.AsyncClient, tally: Tally) -> None:
    while True:
        tally.memory.append(await memory_of(client))
        await asyncio.sleep(0.5)


async def memory_of(client: httpx2.AsyncClient) -> float:
    """Return the resident bytes of the server from its metrics."""
    found = MEMORY.search((await client.get("/metrics")).text)
    return float(found.group(1)) if found else float("nan")


async def _ask_until(
    end: float,
    client: httpx2.AsyncClient,
    good: Sequence[Case],
    bad: Sequence[Case],
    seed: int,
    tally: Tally,
) -> None:
    chance, asked = random.Random(seed), False
    while not asked or time.monotonic() < end:
        asked = True
        case = chance.choice(bad if chance.random() < 0.1 else good)
        began = time.monotonic()
        try:
            response = await client.post("/predict", **case.content)
        except httpx2.HTTPError as error:
            tally.outcomes["no answer"] += 1
            tally.wrong.append(f"{case.kind}: {error!r}")
            continue
        _judge(case, response, time.monotonic() - began, tally)


def _judge(case: Case, response: httpx2.Response, seconds: float, tally: Tally) -> None:
    try:
        body = response.json()
    except ValueError:
        tally.wrong.append(f"{case.kind}: {response.status_code}, not JSON: {response.text[:80]!r}")
        return
    refused = (
        response.status_code == 503 and body.get("message") and response.headers.get("retry-after")
    )
    late = response.status_code == 504 and body.get("message")
    if refused or late:
        tally.outcomes[f"refused: {body['reason']}"] += 1
    elif response.status_code != case.status:
        tally.wrong.append(f"{case.kind}: {response.status_code} {body}")
    elif case.probabilities is None:
        tally.outcomes[f"{case.kind}: {response.status_code}"] += 1
    else:
        found = {item["name"]: item["probability"] for item in body["classes"]}
        if found.keys() == case.probabilities.keys() and all(
            abs(found[name] - p) < TOLERANCE for name, p in case.probabilities.items()
        ):
            tally.outcomes["answered right"] += 1
            tally.seconds.append(seconds)
            tally.batch_sizes[body["batch_size"]] += 1
        else:
            tally.wrong.append(f"{case.kind}: {found} is not {case.probabilities}")
