"""Files and folders that are written whole or not at all, and replaced in one moment."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl


@contextmanager
def atomic_file(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    """A file that takes the place of `path` at the end; until then, that stays as it was.

    What a process that was killed has left behind is removed by the next one that writes to the
    same place. Others may read the file as the umask says.

    Args:
        path: In an existing folder.
        mode, options: As `open` takes them.

    Raises:
        OSError: It cannot be written; `path` is as it was.
    """
    _remove_left_overs(path)
    try:
        with _scratch(path, _new_file) as scratch:
            with scratch.open(mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
    except BaseException as error:
        _name(error, path)
        raise


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end; until then, that stays as it was.

    There is no moment without a whole folder at `path` where the system can exchange two names
    (Linux and macOS, on most file systems); elsewhere there is one between two renames. A link
    stays one, and what it leads to is replaced. What a process that was killed has left behind is
    removed by the next one that writes to the same place.

    Args:
        path: Of the folder; its parents are made.
        replace: Whether what is there by the end may be replaced.

    Yields:
        The new folder, beside the old one. It is locked while it is written.

    Raises:
        FileExistsError: `replace` is off, and another process has made a folder there.
        OSError: It cannot be written or moved; `path` is as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(target)
    inside = _is_inside(target)
    try:
        with _scratch(target, Path.mkdir) as scratch:
            yield scratch
            for file in scratch.iterdir():
                _to_disk(file)
            _move(scratch, target, replace)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        if inside and target.is_dir():
            os.chdir(target)  # this process would stay in the old folder, which is gone


def _is_inside(folder: Path) -> bool:
    """Whether it is the folder that this process works in."""
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:
        return False


def _move(scratch: Path, target: Path, replace: bool) -> None:
    """Put a folder in its place; `scratch` is what was there before, if anything was."""
    while True:
        if replace and target.exists():
            shutil.copymode(target, scratch)
            _exchange(scratch, target)
            return
        try:
            os.rename(scratch, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.exists():
                raise
            if not replace:
                raise FileExistsError(f"{target} exists; another process has made it") from None


def _name(error: BaseException, path: Path) -> None:
    """Says what could not be written, where the system does not (a full disk)."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _prefix(target: Path) -> str:
    return f".{target.name}.writing-"


@contextmanager
def _scratch(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What nobody else writes, beside the place that it is for; locked, and removed at the end."""
    with ExitStack() as stack:
        while True:
            scratch = target.with_name(f"{_prefix(target)}{uuid.uuid4().hex}")
            make(scratch)
            try:
                stack.enter_context(_lock(scratch))
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took it for a left-over
            if scratch.exists():
                break
        try:
            yield scratch
        finally:
            if scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)
            else:
                scratch.unlink(missing_ok=True)


def _new_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _remove_left_overs(target: Path) -> None:
    if sys.platform == "win32":
        return  # nothing there says whether one is still being written
    for left_over in target.parent.glob(f"{_escaped(_prefix(target))}*"):
        with suppress(OSError), _lock(left_over):
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Whoever writes a file or folder holds its lock; BlockingIOError if another process does."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _escaped(name: str) -> str:
    """The name as a pattern that only it fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders; `new` is the old one afterwards."""
    try:
        _exchange_names(os.fsencode(new), os.fsencode(old))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
        aside = new.with_name(f"{new.name}-old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _exchange_names(one: bytes, other: bytes) -> None:
    """Exchange two names in one system call, which Python has no function for."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(one, other, ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        failed = library.renameat2(here, one, here, other, ctypes.c_uint(2))  # RENAME_EXCHANGE
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(other))
