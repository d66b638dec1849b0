"""Files and folders that are written whole or not at all, and replaced atomically."""

from __future__ import annotations

import ctypes
import errno
import glob
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
    """Open a new file that replaces `path` at the end; until then `path` stays as it was.

    What a killed process left behind is removed when the same file is written next. The umask
    decides who may read the file.

    Args:
        path: Path in an existing folder.
        mode: Mode for `open`.
        **options: Other arguments of `open`.

    Raises:
        OSError: If it cannot be written; `path` is as it was.
    """
    with _scratch(path, lambda new: new.touch(exist_ok=False)) as scratch:
        with scratch.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Create a folder that replaces `path` at the end; until then `path` stays as it was.

    Where the system can exchange two names (Linux and macOS, on most file systems), there is a
    whole folder at `path` at every moment; elsewhere there is none between two renames. Where
    `path` is a link, the folder that it leads to is replaced. What a killed process left behind is
    removed when the same folder is written next.

    Args:
        path: Path of the folder; its parents are created.
        replace: Whether a folder that exists by the end may be replaced.

    Yields:
        The new folder, beside the old one. It is locked while it is written.

    Raises:
        FileExistsError: If `replace` is False and another process has created the folder.
        OSError: If it cannot be written or moved; `path` is as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = False
    with suppress(OSError):
        inside = os.path.samefile(target, os.curdir)
    try:
        with _scratch(target, Path.mkdir) as scratch:
            yield scratch
            for file in scratch.iterdir():
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
            _move(scratch, target, replace)
    finally:
        if inside and target.is_dir():
            os.chdir(target)  # the process is still in the old folder, which is gone


def _move(scratch: Path, target: Path, replace: bool) -> None:
    """Move a folder to `target`; `scratch` is what was there before, if anything was."""
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


@contextmanager
def _scratch(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Create a locked file or folder beside `target`, and remove it at the end."""
    prefix = f".{target.name}.writing-"
    if sys.platform != "win32":  # where no lock says whether one is still being written
        for abandoned in target.parent.glob(f"{glob.escape(prefix)}*"):
            with suppress(OSError), _lock(abandoned):
                _remove(abandoned)
    try:
        with ExitStack() as stack:
            while True:
                scratch = target.with_name(f"{prefix}{uuid.uuid4().hex}")
                create(scratch)
                try:
                    stack.enter_context(_lock(scratch))
                except (BlockingIOError, FileNotFoundError):
                    continue  # another process took it for abandoned
                except OSError:  # a file system without locks
                    _remove(scratch)
                    raise
                if scratch.exists():
                    break
            try:
                yield scratch
            finally:
                _remove(scratch)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk
            error.filename = str(target)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder; raise BlockingIOError if another process holds it."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


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
    """Exchange two names in one system call that Python does not offer."""
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
