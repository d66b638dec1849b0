"""Builds the distributions, and makes an environment of a row with the wheel in it.

pip reads its own configuration, as the installed package's users' does: an index of CPU builds that
it names is taken, and makes a row small. PyPI's builds for Linux x86-64 are CUDA's, of 5 to 6 GB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from bench.matrix.rows import Row

ROOT = Path(__file__).parents[2]
PYENV = Path.home() / ".pyenv" / "versions"
TESTERS = ("pytest>=8,<9.2", "pytest-benchmark>=4", "pytest-xdist>=3.7")
_IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "build", "site")


class CommandError(RuntimeError):
    """A command failed; the message is the end of its output."""


def ran(words: Sequence[object], cwd: Path) -> str:
    """Run a command in a folder, without the source tree on its path, and return its stdout.

    Raises:
        CommandError: If its exit status is not 0.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise CommandError("\n".join((done.stdout + done.stderr).splitlines()[-30:]))
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it; return the wheel and the unpacked tree.

    Raises:
        CommandError: If the build fails.
    """
    # A copy, so that nothing of an earlier or a simultaneous build in the tree gets in.
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=_IGNORED)
    ran([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source], folder)
    [wheel], [archive] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return wheel, folder / archive.name.removesuffix(".tar.gz")


def interpreter(version: str) -> Path | None:
    """Return an interpreter of a minor version: from the path, or one that pyenv installed."""
    for name in (shutil.which(f"python{version}"), *sorted(PYENV.glob(f"{version}.*/bin/python"))):
        if name is not None and _is_version(name, version):
            return Path(name)
    return None


def _is_version(name: str | Path, version: str) -> bool:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([name, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == version


def install(row: Row, folder: Path, base: Path, wheel: Path) -> Path:
    """Make an environment with a row's versions and the wheel with its extra "train".

    An environment that is there already is kept, and only the wheel in it replaced.

    Args:
        row: Its versions.
        folder: Where the environment is, or shall be.
        base: Interpreter that it is made from.
        wheel: Built distribution.

    Returns:
        The environment's interpreter.

    Raises:
        CommandError: If pip finds no distribution of a version, or an installation fails.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        ran([base, "-m", "venv", folder], folder.parent)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [f"{name}=={getattr(row, name)}" for name in ("torch", "torchvision", "timm")]
    ran([*pip, *pinned, f"{wheel}[train]"], folder.parent)
    ran([*pip, "--no-deps", "--force-reinstall", wheel], folder.parent)
    ran([python, "-m", "pip", "check", "--disable-pip-version-check"], folder.parent)
    return python


def tested(python: Path, tree: Path, tests: Sequence[str]) -> str:
    """Run tests of the unpacked source distribution; return pytest's last line.

    Raises:
        CommandError: If a test fails.
    """
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    ran([*pip, *TESTERS], tree)
    words = [python, "-m", "pytest", "-q", "--numprocesses", "0", "-m", "not full", *tests]
    return ran(words, tree).splitlines()[-1].strip("= ")
