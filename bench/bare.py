"""`vpt_fast.kernels` in a source tree that is not installed.

`kernels/` installs as `vpt_fast.kernels`. A GPU that is lent for minutes gets the tree alone, and
no network to install it with: there the folder stands for the package that it would be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "vpt_fast.kernels"
FOLDER = Path(__file__).resolve().parent.parent / "kernels"


class _Beside(MetaPathFinder):
    """Finds one package, for the `vpt_fast` that stands beside it and for no other."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's place, or None for any other name or parent."""
        if name != NAME or str(FOLDER.parent / "vpt_fast") not in (path or ()):
            return None
        places = [str(FOLDER)]
        return spec_from_file_location(
            name, FOLDER / "__init__.py", submodule_search_locations=places
        )


def find_kernels() -> None:
    """Let `vpt_fast.kernels` be found in the source tree that `vpt_fast` itself comes from."""
    if not any(isinstance(finder, _Beside) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Beside())
