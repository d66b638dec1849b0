"""A sweep's journal that is cut or damaged: the damage is named, and the rest is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from support.adapters.flipped_bits import flipped_bits
from test_sweep import LINEAR, SEEDS, FakeTask, lines

from vpt_fast.train.sweep import sweep
from vpt_fast.train.sweep.journal import CheckedJournal
from vpt_fast.train.sweep.sweep import JOURNAL, Result, Sweep

RUNS = 3 * 2 + len(SEEDS)


def run(folder: Path) -> tuple[list[Result], int, list[str]]:
    """Run a sweep; return its results, the number of its runs, and messages about its journal."""
    task, (messages, log) = FakeTask(), lines()
    found = Sweep(folder, task, SEEDS, log).run([LINEAR])
    return found, len(task.runs), [line for line in messages if JOURNAL in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Result]]:
    folder = tmp_path_factory.mktemp("whole")
    found, runs, messages = run(folder)
    assert (runs, messages) == (RUNS, [])
    return (folder / JOURNAL).read_bytes(), found


def _cut_the_end(content: bytes) -> bytes:
    return content[:-20]


def _nul_bytes_at_the_end(content: bytes) -> bytes:
    return content[:-20] + bytes(20)


def _a_nul_block_in_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(300) + content[middle + 300 :]


def _a_line_that_is_gone(content: bytes) -> bytes:
    rows = content.splitlines(keepends=True)
    return b"".join(rows[: len(rows) // 2] + rows[len(rows) // 2 + 1 :])


def _no_text(content: bytes) -> bytes:
    rows = content.splitlines(keepends=True)
    return b"".join([*rows[:20], b"\xff\xfe\n", *rows[20:]])


def _deep(content: bytes) -> bytes:
    return content + b"[" * 100_000 + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        _cut_the_end,
        _nul_bytes_at_the_end,
        _a_nul_block_in_the_middle,
        _a_line_that_is_gone,
        _no_text,
        _deep,
    ],
)
def test_the_rest_is_used(
    damage: Callable[[bytes], bytes], whole: tuple[bytes, list[Result]], tmp_path: Path
) -> None:
    content, expected = whole
    (tmp_path / JOURNAL).write_bytes(damage(content))
    found, runs, messages = run(tmp_path)
    assert found == expected
    assert runs <= 3, "what is whole is not run again"
    found, runs, again = run(tmp_path)
    assert (found, runs) == (expected, 0)
    if damage is not _a_line_that_is_gone:
        assert len(again) == 1 and "damaged and left out; the rest is used" in again[0]


def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    messages, log = lines()
    journal = CheckedJournal(tmp_path / JOURNAL, log)
    other = CheckedJournal(tmp_path / JOURNAL, log)
    first = {"op_code": 0, "worker_id": "a", "study_name": "s", "directions": [2]}
    journal.append_logs([first])
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[:-3])
    assert other.read_logs(0) == []
    (tmp_path / JOURNAL).write_bytes(content)
    assert other.read_logs(0) == [first] and messages == []


def test_a_lost_beginning_of_a_methods_runs_is_refused(
    whole: tuple[bytes, list[Result]], tmp_path: Path
) -> None:
    rows = whole[0].splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join(rows[1:]))
    with pytest.raises(ValueError, match="damaged before line 1.*move it away"):
        run(tmp_path)


def test_a_journal_that_optuna_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[bytes, list[Result]]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "CheckedJournal", lambda path, _: JournalFileBackend(str(path)))
        run(tmp_path)
    assert b"crc32" not in (tmp_path / JOURNAL).read_bytes()
    assert run(tmp_path) == (whole[1], 0, [])


def test_optuna_reads_ours(whole: tuple[bytes, list[Result]], tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(whole[0])
    studies = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL))).get_all_studies()
    assert [study.study_name for study in studies] == ["linear, selection", "linear, final"]
    assert json.loads(whole[0].splitlines()[5])["line"] == 5


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_flipped_bits(flips: int, whole: tuple[bytes, list[Result]], tmp_path: Path) -> None:
    """Refused, or the same results."""
    content, expected = whole
    used = 0
    for number, damaged in enumerate(flipped_bits(content, flips)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(damaged)
        try:
            found, runs, _ = run(folder)
        except ValueError as error:
            assert JOURNAL in str(error)
        else:
            assert found == expected and runs <= 3
            used += 1
    assert used > flips / 2
