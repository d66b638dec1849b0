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
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import find_packages

from bench.matrix.rows import lowest
from vpt_fast.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vpt_fast"
LINK = "vpt_fast/kernels"
GENERATED = ("PKG-INFO", "setup.cfg", "vpt_fast.egg-info/")
"""What setuptools adds to a source distribution."""


def sources() -> set[str]:
    """Return the package's files as a wheel names them, those behind the link to kernels/ too."""
    return {
        path.relative_to(ROOT).as_posix()
        for top in (PACKAGE, PACKAGE / "kernels")
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def listed() -> set[str]:
    """Return the files that git lists, or all files of an unpacked source distribution."""
    if (ROOT / ".git").exists():
        command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = set(done.stdout.splitlines())
    else:
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    return {name for name in names if (ROOT / name).exists() and not name.startswith(GENERATED)}


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
    for name in listed():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
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


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    """Unpack the source distribution; return its folder."""
    [archive] = (built / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(built / "unpacked", filter="data")
    return built / "unpacked" / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_holds_what_git_lists(unpacked: Path) -> None:
    """The kernels are in it as the package's, too: setuptools follows the link to them."""
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    names = {name for name in files if (unpacked / name).is_file()}
    names = {name for name in names if not name.startswith(GENERATED)}
    kernels = {name for name in names if name.startswith(f"{LINK}/")}
    assert names - kernels == {
        name for name in listed() - {LINK} if not name.startswith(f"{LINK}/")
    }
    assert {name.removeprefix("vpt_fast/") for name in kernels if name.endswith(".py")} == {
        name for name in names if name.startswith("kernels/")
    }
    for name in kernels:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_source_distribution_runs_its_own_tests(unpacked: Path) -> None:
    """Tests that read the package, its kernels, the documents and the benchmarks."""
    tests = (
        "tests/docs/test_pages.py",
        "tests/reference/test_grids.py",
        "tests/test_bare_tree.py",
        "tests/test_packaging.py::test_every_folder_is_a_package",
    )
    printed = python("-m", "pytest", "-q", "--numprocesses", "0", *tests, cwd=unpacked)
    assert " passed" in printed and " failed" not in printed, printed


def test_the_source_distribution_makes_the_same_wheel(built: Path) -> None:
    with ZipFile(wheel_of(built / "tree")) as one, ZipFile(wheel_of(built / "sdist")) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())
        for name in one.namelist():
            if not name.endswith("/RECORD"):
                assert one.read(name) == two.read(name), name


def metadata_of(wheel: Path) -> Metadata:
    """Return a wheel's metadata, by the rules that an index checks at an upload.

    Raises:
        ExceptionGroup: If they are not valid.
    """
    with ZipFile(wheel) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        assert f"{Path(name).parent}/licenses/LICENSE" in opened.namelist()
        return Metadata.from_email(opened.read(name), validate=True)


def test_the_metadata_are_valid_and_complete(built: Path) -> None:
    found = metadata_of(wheel_of(built / "tree"))
    assert found.license_expression == "Apache-2.0" and found.license_files == ["LICENSE"]
    assert found.author == "The vpt_fast authors" and "Typing :: Typed" in (found.classifiers or ())
    assert (found.description or "").startswith("# vpt_fast")


def test_the_lowest_versions_are_those_of_rows_that_ran(built: Path) -> None:
    found = metadata_of(wheel_of(built / "tree"))
    assert str(found.requires_python) == f">={lowest('python')}"
    required = {r.name: r for r in map(Requirement, map(str, found.requires_dist or ()))}
    for name in ("torch", "torchvision", "triton", "timm"):
        [least] = [s.version for s in required[name].specifier if s.operator == ">="]
        assert Version(least) == Version(lowest(name)), name


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
