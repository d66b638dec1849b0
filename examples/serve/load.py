"""`python -m examples.serve.load`: overloads a server on this machine and checks its answers.

It starts a server of its own with untrained adapters, lets many clients send requests without
pause for a while, and compares every answer with the bank's for the image alone. It ends with
status 1 if an answer was wrong, a request got no answer, or the server did not survive.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx2
import typer

from examples.serve.load_clients import Tally, bad_cases, good_cases, memory_of, press
from examples.serve.trial import server_process, write_adapters
from vpt_fast.train.run.bank_folder import open_bank

UPLOAD_BYTES = 200_000


@dataclass(frozen=True)
class Report:
    """Result of a run.

    Attributes:
        seconds: Duration of the run.
        tally: Outcomes of the requests.
        before: Resident bytes of the server before the clients, after one request for each task.
        after: Resident bytes of the server two seconds after the clients.
        alive: Whether the server is healthy afterwards and still answers correctly.
    """

    seconds: float
    tally: Tally
    before: float
    after: float
    alive: bool

    @property
    def well(self) -> bool:
        """Whether the server passed all checks."""
        return self.alive and not self.tally.wrong and self.tally.outcomes["answered right"] > 0


def run_load(folder: Path, seconds: float, clients: int, tasks: int, max_requests: int) -> Report:
    """Run clients against a server and return the result.

    Args:
        folder: Empty folder for the adapters.
        seconds: Time that the clients send requests.
        clients: Number of clients.
        tasks: Number of tasks of the bank.
        max_requests: Largest number of predictions in progress.
    """
    bank, _ = open_bank(write_adapters(folder, tasks))
    good, bad = good_cases(bank), bad_cases(bank.tasks[0], UPLOAD_BYTES)
    options = {
        "threads": 1,
        "max-upload-bytes": UPLOAD_BYTES,
        "max-requests": max_requests,
        "max-queue": max(1, max_requests // 2),
        "max-batch": 16,
        "request-seconds": 5,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]

    async def run(address: str) -> Report:
        warm = await press(address, good, good, 1, 0.5)
        async with httpx2.AsyncClient(base_url=address) as client:
            before = await memory_of(client)
            tally = await press(address, good, bad, clients, seconds)
            await asyncio.sleep(min(2.0, seconds))
            after = await memory_of(client)
            health = await client.get("/health")
        again = await press(address, good, good, 1, 0.2)
        right = all(not t.wrong and t.outcomes["answered right"] for t in (warm, again))
        return Report(seconds, tally, before, after, health.status_code == 200 and right)

    with server_process(folder, *given) as (_, address):
        return asyncio.run(run(address))


def show(report: Report) -> None:
    """Print the result of a run."""
    tally, mib = report.tally, 2**20
    total = sum(tally.outcomes.values()) + len(tally.wrong)
    typer.echo(f"{total:,} requests in {report.seconds:g} s")
    for name, count in tally.outcomes.most_common():
        typer.echo(f"  {count:7,}  {name}")
    typer.echo(f"  {len(tally.wrong):7,}  wrong, or without an answer")
    for line in tally.wrong[:10]:
        typer.echo(f"           {line}")
    if tally.seconds:
        times = sorted(tally.seconds)
        late = times[min(len(times) - 1, math.ceil(0.99 * len(times)))]
        typer.echo(
            f"answered: {len(times) / report.seconds:,.0f} per second, "
            f"median {1000 * median(times):.0f} ms, 99% within {1000 * late:.0f} ms"
        )
        sizes = tally.batch_sizes
        mean = sum(size * count for size, count in sizes.items()) / sum(sizes.values())
        typer.echo(f"an answered image's batch: {mean:.1f} images on average, at most {max(sizes)}")
    typer.echo(
        f"server's memory: {report.before / mib:.0f} MiB before, at most "
        f"{max(tally.memory, default=math.nan) / mib:.0f} MiB, {report.after / mib:.0f} MiB after"
    )
    typer.echo("the server lives and answers right" if report.alive else "THE SERVER IS NOT WELL")


def load(
    seconds: Annotated[float, typer.Option(min=0.5, help="How long the clients ask.")] = 30.0,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 128,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the bank.")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="The server's limit.")] = 48,
) -> None:
    """Overload a server on this machine, and check its answers."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_load(Path(folder), seconds, clients, tasks, max_requests)
    show(report)
    if not report.well:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(load)
