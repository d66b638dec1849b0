"""Optuna's journal with numbered lines and checksums: damage is found, and the rest is used.

Optuna counts trials by the lines that begin them, so that a line that is lost would give every
later one to another trial. Each line says how many lines, and how many beginnings, came before it:
what is missing is known, and something without effect takes its place.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

Log = dict[str, Any]

# Optuna's operation codes.
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE, _CREATE_TRIAL = 0, 2, 4
_OURS = ("line", "studies", "trials", "crc32")


class CheckedJournal(BaseJournalBackend):
    """A file that several processes append to, on one machine or several.

    Args:
        path: Of the file; made if it is not there. Journals that Optuna wrote itself are read as
            they are.
        log: Called with a sentence about every line that is left out.
    """

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path, self._log = path, log
        self._lock = JournalFileSymlinkLock(str(path))
        self._logs: list[Log] = []
        self._offset, self._line = 0, 0
        self._studies, self._trials = 0, 0
        self._bad: list[int] = []
        path.touch()

    def read_logs(self, log_number_from: int) -> list[Log]:
        """All logs from a number on.

        Raises:
            ValueError: If a line that began a method's runs is lost.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole, _, _ = content.rpartition(b"\n")  # the rest is being written, or torn
        for line in whole.split(b"\n") if whole else []:
            self._line += 1
            self._offset += len(line) + 1
            self._take(line)
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[Log]) -> None:
        """Adds lines, after all that others have added."""
        self._lock.acquire()
        try:
            self.read_logs(0)
            with self.path.open("ab") as file:
                if file.tell() > self._offset:
                    file.write(b"\n")  # whoever began this line is gone
                studies, trials = self._studies, self._trials
                for number, log in enumerate(logs, len(self._logs)):
                    file.write(_sealed(log, number, studies, trials))
                    studies += log["op_code"] == _CREATE_STUDY
                    trials += log["op_code"] == _CREATE_TRIAL
        finally:
            self._lock.release()

    def _take(self, line: bytes) -> None:
        log = _opened(line)
        if log is None:
            self._bad.append(self._line)
            return
        if "line" in log:
            self._fill(log)
        elif self._bad:
            raise ValueError(self._lost("and says not what is lost"))
        if self._bad:
            numbers = ", ".join(map(str, self._bad))
            self._log(f"{self.path} line {numbers} is damaged and left out; the rest is used")
            self._bad = []
        self._add({key: value for key, value in log.items() if key not in _OURS})

    def _add(self, log: Log) -> None:
        self._logs.append(log)
        self._studies += log["op_code"] == _CREATE_STUDY
        self._trials += log["op_code"] == _CREATE_TRIAL

    def _fill(self, log: Log) -> None:
        """Put something without effect where lines before this one are lost."""
        missing = log["line"] - len(self._logs)
        trials = log["trials"] - self._trials
        if (
            log["studies"] != self._studies
            or not 0 <= trials <= missing
            or (trials and missing < 0)
        ):
            raise ValueError(self._lost("and a line that began a method's runs is lost"))
        for number in range(missing):
            self._add(_failed_trial() if number < trials else _nothing())

    def _lost(self, what: str) -> str:
        return (
            f"{self.path} is damaged before line {self._line}, {what}; move it away to start again"
        )


def _failed_trial() -> Log:
    """A trial that is over: what others have to say of it is not taken."""
    failed = TrialState.FAIL.value
    return {**_nothing(), "op_code": _CREATE_TRIAL, "study_id": 0, "datetime_start": None,
            "state": failed}  # fmt: skip


def _nothing() -> Log:
    """An attribute of a study that is not there: Optuna passes it by."""
    return {"op_code": _SET_STUDY_ATTRIBUTE, "worker_id": "", "study_id": -1, "user_attr": {"": 0}}


def _sealed(log: Log, line: int, studies: int, trials: int) -> bytes:
    full = {**log, "line": line, "studies": studies, "trials": trials}
    return _text({**full, "crc32": zlib.crc32(_text(full))}) + b"\n"


def _opened(line: bytes) -> Log | None:
    """What a line holds; None if it is torn, or not what was written."""
    try:
        log = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(log, dict) or "op_code" not in log:
        return None
    if not any(key in log for key in _OURS):
        return log
    rest = {key: value for key, value in log.items() if key != "crc32"}
    return log if log.get("crc32") == zlib.crc32(_text(rest)) else None


def _text(log: Log) -> bytes:
    return json.dumps(log, separators=(",", ":")).encode()
