"""What a job tells while it runs, event by event: what is stopped later takes nothing with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.ceilings import Ceilings
from bench.compare.collect import Row

Emit = Callable[[str, Any], None]
"""emit(kind, value): an event of `Outcome.add`."""


def ignore_event(kind: str, value: Any) -> None:
    """Emit ignore_event."""


@dataclass
class Outcome:
    """What a job gave so far.

    Attributes:
        by_provider: rows of the results; a later one of a provider replaces its earlier one.
        wrong: results that are wrong, and steps that failed, in words. Too little memory, and what
            torch.compile or a capture could not do, are only recorded_launches in the row.
        said: what else there is to print.
        ceilings: of the device, if they were asked for.
        facts: of the machine, if they were asked for.
        running: providers that are at work.
        faulted: providers one of which left the device so that it no longer computes; what came
            after them has no times.
        device_lost: whether the device no longer computes, though all that could be timed was.
    """

    by_provider: dict[str, Row] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
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
        """Note an event.

        Args:
            kind: "row", "wrong" or "message" for one more; else the attribute to set.
            value: of the event.
        """
        if kind == "row":
            self.by_provider[value["provider"]] = value
        elif kind in ("wrong", "message"):
            getattr(self, kind).append(value)
        else:
            setattr(self, kind, value)
