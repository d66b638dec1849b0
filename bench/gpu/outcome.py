"""Events that a job emits while it runs: what was emitted is kept even if the job is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.ceilings import Ceilings
from bench.compare.collect import Row

Emit = Callable[[str, Any], None]
"""emit(kind, value) reports an event; `Outcome.add` lists the kinds."""


def ignore_event(kind: str, value: Any) -> None:
    """Ignore an event."""


@dataclass
class Outcome:
    """Result of a job so far.

    Attributes:
        by_provider: Row of the results by provider, the latest one of each.
        wrong: Descriptions of wrong results and of failures. Lack of memory, and what torch.compile
            or a graph capture does not support, are only noted in the row.
        messages: Other lines to print.
        ceilings: Ceilings of the device, if the job measures them.
        facts: Facts of the machine, if the job collects them.
        running: Providers that are running.
        faulted: Providers one of which made the device unusable; later ones have no times.
        device_lost: Whether the device became unusable after everything had been timed.
    """

    by_provider: dict[str, Row] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    ceilings: Ceilings | None = None
    facts: dict[str, str] = field(default_factory=dict)
    running: tuple[str, ...] = ()
    faulted: tuple[str, ...] = ()
    device_lost: bool = False

    @property
    def rows(self) -> list[Row]:
        """Rows of the results."""
        return list(self.by_provider.values())

    def add(self, kind: str, value: Any) -> None:
        """Add an event.

        Args:
            kind: "row", "wrong" or "message" to add one; otherwise the attribute to set.
            value: Value of the event.
        """
        if kind == "row":
            self.by_provider[value["provider"]] = value
        elif kind == "wrong":
            self.wrong.append(value)
        elif kind == "message":
            self.messages.append(value)
        else:
            setattr(self, kind, value)
