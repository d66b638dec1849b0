"""The wheel and the source distribution, each with every module and asset."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from setuptools import find_packages

from vpt_fast.version import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = ("bench", "examples", "kernels", "tests", "vpt_fast")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
PACKAGE = ROOT / "vpt_fast"


def sources() -> set[str]:
    """Return the package's files as a wheel names them, those behind the link to kernels/ too."""
    return {
        path.relative_to(ROOT).as_posix()
        for top in (PACKAGE, PACKAGE / "kernels")
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_folder_is_a_package() -> None:
    """`setup.py` finds packages, and a folder without `__init__.py` is not one."""
    found = find_packages(str(ROOT), include=["vpt_fast", "vpt_fast.*"])
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in sources()}
    assert set(found) == folders - {"vpt_fast.assets"}
    assert {"vpt_fast.kernels", "vpt_fast.ops"} <= folders


def python(*arguments: object, executable: object = sys.executable, cwd: Path = ROOT) -> str:
    """Run an interpreter without the source tree on its path, and return its stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(executable), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel into tree/, and the source distribution and its wheel into sdist/."""
    pytest.importorskip("build", reason="the dev extra is not installed")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    wheel = ("pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    python("-m", *wheel, "--wheel-dir", folder / "tree", source)
    # Leaves nothing that the next build could take its files from.
    for name in ("build", "vpt_fast.egg-info"):
        shutil.rmtree(source / name, ignore_errors=True)
    # Makes the wheel from the source distribution, unpacked.
    python("-m", "build", "--no-isolation", "--outdir", folder / "sdist", source)
    return folder


def wheel_of(folder: Path) -> Path:
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with ZipFile(wheel_of(built / "tree")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources()
    assert {"vpt_fast/py.typed", "vpt_fast/assets/demo_vit.safetensors"} <= names
    assert any(name.startswith("vpt_fast/kernels/") for name in names)


def test_the_source_distribution_makes_the_same_wheel(built: Path) -> None:
    [archive] = (built / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert sources() <= names
    assert not [name for name in names if name.startswith(("tests", "bench", "examples"))]
    with ZipFile(wheel_of(built / "tree")) as one, ZipFile(wheel_of(built / "sdist")) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        for name in one.namelist():
            if not name.endswith("/RECORD"):
                assert one.read(name) == two.read(name), name


@pytest.fixture(scope="module")
def fresh(built: Path) -> Path:
    """Create an environment with the wheel, which also sees the running environment's packages.

    `.pth` files of the running environment are not read, so that an editable install is inactive.
    """
    folder = built / "environment"
    venv.create(folder, symlinks=True)
    executable = folder / "bin" / "python"
    own = python(
        "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable
    )
    others = "\n".join(site.getsitepackages())
    (Path(own.strip()) / "running_environment.pth").write_text(others, encoding="utf-8")
    install = ("install", "--no-deps", "--no-index", "--no-compile", "--quiet")
    python("-m", "pip", "--python", executable, *install, wheel_of(built / "tree"))
    return folder


IMPORTS = """
import importlib, json, pkgutil
import vpt_fast
names = [found.name for found in pkgutil.walk_packages(vpt_fast.__path__, "vpt_fast.")]
# These run a command when they are imported.
names = [name for name in names if not name.endswith(".__main__")]
print(json.dumps([importlib.import_module(name).__file__ for name in ("vpt_fast", *names)]))
"""


def test_every_module_of_the_wheel_can_be_imported(fresh: Path, tmp_path: Path) -> None:
    printed = python("-c", IMPORTS, executable=fresh / "bin" / "python", cwd=tmp_path)
    files = [Path(name) for name in json.loads(printed.splitlines()[-1])]
    [home] = fresh.glob("lib/python*/site-packages")
    imported = {path.relative_to(home).as_posix() for path in files}
    wanted = {name for name in sources() if name.endswith(".py")}
    assert imported == {name for name in wanted if not name.endswith("/__main__.py")}


def test_the_wheel_installs_the_command(fresh: Path, tmp_path: Path) -> None:
    printed = python("--version", executable=fresh / "bin" / "vpt-fast", cwd=tmp_path)
    assert printed == f"vpt-fast {__version__}\n"
