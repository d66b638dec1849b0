"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path, mode: str, permissions: int | None = 0o644, **options: Any) -> Iterator:
    """A file that takes the place of `path` at the end; until then, that stays as it was.

    Args:
        path: In an existing folder, where the file is called .<name>-<random> meanwhile; only a
            process that is killed leaves it there.
        mode, options: As `open` takes them.
        permissions: Of the file; None leaves it to its owner alone.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
        if permissions is not None:
            Path(name).chmod(permissions)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
