"""Saving over an adapter: there is a whole one at every moment, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support.formulations.families import TOKEN
from support.processes import exit_codes, started
from test_adapter import CONFIG, TENSORS, save, trained
from test_adapter_refusals import plain

from vpt_fast import VPTDeep, load_adapter
from vpt_fast.adapter import atomic
from vpt_fast.adapter.files import read_adapter, read_config

ROOT = Path(__file__).parents[2]
KILLED = ROOT / "tests" / "support" / "adapters" / "kill_while_saving.py"


@pytest.mark.parametrize("kills", [40, pytest.param(1000, marks=pytest.mark.full)])
def test_killed_while_saving(kills: int, tmp_path: Path) -> None:
    """A reader always finds a whole adapter; the next save removes what killed ones left."""
    arguments = [sys.executable, str(KILLED), str(tmp_path), str(kills)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["looks"] > kills
    assert found["left_behind"] > 0, "no kill came in the middle"
    assert (found["failures"], found["broken"], found["end"]) == ([], [], ["adapter"])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = save(trained(TOKEN, VPTDeep(2)), tmp_path / "store" / "v1")
    (tmp_path / "current").symlink_to(real)
    save(trained(TOKEN, VPTDeep(5)), tmp_path / "current", overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert read_config(real)["method"]["num_prompts"] == 5
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["v1"]


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    for umask, file_mode, folder_mode in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750)):
        before = os.umask(umask)
        try:
            directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / f"{umask:o}")
        finally:
            os.umask(before)
        assert directory.stat().st_mode & 0o777 == folder_mode
        for name in (CONFIG, TENSORS):
            assert (directory / name).stat().st_mode & 0o777 == file_mode, name


def test_a_folder_keeps_its_permissions(tmp_path: Path) -> None:
    directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    directory.chmod(0o2775)
    save(trained(TOKEN, VPTDeep(3)), directory, overwrite=True)
    assert directory.stat().st_mode & 0o7777 == 0o2775


def test_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some network file systems two renames replace the exchange."""
    directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(atomic, "_exchange_names", refuse)
    save(trained(TOKEN, VPTDeep(3)), directory, overwrite=True)
    assert read_config(directory)["method"]["num_prompts"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_writer_is_left_alone(tmp_path: Path) -> None:
    """A folder that is still being written is not removed."""
    directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    with atomic.atomic_folder(directory) as mine:
        (mine / CONFIG).write_text("{}")
        save(trained(TOKEN, VPTDeep(3)), directory, overwrite=True)
        assert mine.is_dir()
    assert (directory / CONFIG).read_text() == "{}"


def test_a_reader_gets_files_of_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is replaced while its files are read is read again."""
    directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    other, original = trained(TOKEN, VPTDeep(5)), Path.read_bytes
    pending: list[Callable[[], Path]] = [lambda: save(other, directory, overwrite=True)]

    def replaced_meanwhile(path: Path) -> bytes:
        if path.name == TENSORS and pending:
            pending.pop()()
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", replaced_meanwhile)
    config, tensors = read_adapter(directory)
    assert config["method"]["num_prompts"] == len(tensors["blocks.0.prompt.tokens"]) == 5


def test_a_full_disk(tmp_path: Path) -> None:
    """With a limit of 2 KB a file there is an OSError, and the old adapter stays."""
    directory = save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    model = trained(TOKEN, VPTDeep(5))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{directory}'"):
            save(model, directory, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_config(directory)["method"]["num_prompts"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    load_adapter(plain(), directory)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the adapter, and nothing is left behind."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available") as caught:
        save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    assert caught.value.filename == str(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def write_300_times(root: Path) -> None:
    warnings.simplefilter("error")
    for _ in range(300):
        with atomic.atomic_folder(root / "adapter") as folder:
            (folder / "a").write_text("whole")
        with atomic.atomic_file(root / "file", "w") as file:
            file.write("whole")


def test_several_processes_save_at_once(tmp_path: Path) -> None:
    """No process removes a file that another is writing or has just written."""
    writers = [started(write_300_times, tmp_path) for _ in range(3)]
    assert exit_codes(writers) == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]
    assert (tmp_path / "adapter" / "a").read_text() == (tmp_path / "file").read_text() == "whole"


def test_a_folder_that_another_process_creates_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with (
        pytest.raises(FileExistsError, match="adapter exists; another process"),
        atomic.atomic_folder(target, replace=False) as mine,
    ):
        (mine / CONFIG).write_text("mine")
        target.mkdir()
        (target / CONFIG).write_text("theirs")
    assert (target / CONFIG).read_text() == "theirs"
    with atomic.atomic_folder(tmp_path / "other") as mine:
        (tmp_path / "other").mkdir()
        (mine / CONFIG).write_text("mine")
    assert (tmp_path / "other" / CONFIG).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


def test_the_working_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process works in the new folder afterwards, not in the deleted one."""
    save(trained(TOKEN, VPTDeep(2)), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    for prompts in (3, 4):
        save(trained(TOKEN, VPTDeep(prompts)), Path("."), overwrite=True)
        assert Path.cwd() == tmp_path / "adapter"
        assert read_config(Path(CONFIG).parent)["method"]["num_prompts"] == prompts
