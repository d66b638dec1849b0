"""Optuna's journal with numbered lines and checksums, which survives damaged lines.

Optuna numbers trials by the lines that create them, so that a missing line would assign every later
one to another trial. Each line here records how many lines, studies and trials precede it, so that
placeholders without effect can replace missing lines.
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
    """Journal file that several processes append to, on one machine or several.

    Args:
        path: Path of the file, created if it is missing. Journals that Optuna itself wrote are read
            too.
        log: Function called with a sentence about damaged lines.
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
        """Return all logs from a number on.

        Raises:
            ValueError: If a line that creates a study is missing.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole, _, _ = content.rpartition(b"\n")  # the last line may be incomplete
        for line in whole.split(b"\n") if whole else []:
            self._line += 1
            self._offset += len(line) + 1
            self._read_line(line)
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[Log]) -> None:
        """Append lines after all that other processes have appended."""
        self._lock.acquire()
        try:
            self.read_logs(0)
            with self.path.open("ab") as file:
                if file.tell() > self._offset:
                    file.write(b"\n")  # the process that began this line died
                studies, trials = self._studies, self._trials
                for number, log in enumerate(logs, len(self._logs)):
                    file.write(_encoded(log, number, studies, trials))
                    studies += log["op_code"] == _CREATE_STUDY
                    trials += log["op_code"] == _CREATE_TRIAL
        finally:
            self._lock.release()

    def _read_line(self, line: bytes) -> None:
        log = _decoded(line)
        if log is None:
            self._bad.append(self._line)
            return
        if "line" in log:
            self._insert_placeholders(log)
        elif self._bad:
            raise ValueError(self._damage_message("and says not what is lost"))
        if self._bad:
            numbers = ", ".join(map(str, self._bad))
            self._log(f"{self.path} line {numbers} is damaged and left out; the rest is used")
            self._bad = []
        self._add({key: value for key, value in log.items() if key not in _OURS})

    def _add(self, log: Log) -> None:
        self._logs.append(log)
        self._studies += log["op_code"] == _CREATE_STUDY
        self._trials += log["op_code"] == _CREATE_TRIAL

    def _insert_placeholders(self, log: Log) -> None:
        """Insert logs without effect for missing lines before this one."""
        missing = log["line"] - len(self._logs)
        trials = log["trials"] - self._trials
        if (
            log["studies"] != self._studies
            or not 0 <= trials <= missing
            or (trials and missing < 0)
        ):
            raise ValueError(self._damage_message("and a line that began a method's runs is lost"))
        for number in range(missing):
            self._add(_failed_trial() if number < trials else _no_operation())

    def _damage_message(self, what: str) -> str:
        return (
            f"{self.path} is damaged before line {self._line}, {what}; move it away to start again"
        )


def _failed_trial() -> Log:
    """Return a log that creates a failed trial, whose later logs Optuna ignores."""
    failed = TrialState.FAIL.value
    return {**_no_operation(), "op_code": _CREATE_TRIAL, "study_id": 0, "datetime_start": None,
            "state": failed}  # fmt: skip


def _no_operation() -> Log:
    """Return a log that sets an attribute of a missing study, which Optuna ignores."""
    return {"op_code": _SET_STUDY_ATTRIBUTE, "worker_id": "", "study_id": -1, "user_attr": {"": 0}}


def _encoded(log: Log, line: int, studies: int, trials: int) -> bytes:
    full = {**log, "line": line, "studies": studies, "trials": trials}
    return _text({**full, "crc32": zlib.crc32(_text(full))}) + b"\n"


def _decoded(line: bytes) -> Log | None:
    """Return the log in a line; None if the line is incomplete or damaged."""
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
