"""Every extra of setup.py suffices for its commands; missing ones are named in one line."""

from __future__ import annotations

import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.pictures import make_folders, write_checkpoint

from vpt_fast.extras import EXTRAS, MissingExtraError, require_extra
from vpt_fast.train.common.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
LIBRARY = {"torch", "triton", "timm", "numpy", "safetensors"}
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """Return the arguments of `setuptools.setup`."""
    given: dict[str, Any] = {}
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        os.chdir(ROOT)
        try:
            runpy.run_path("setup.py")
        finally:
            os.chdir(before)
    return given


def names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_setup_declares_the_required_packages(declared: dict[str, Any]) -> None:
    extras = declared["extras_require"]
    assert names(declared["install_requires"]) == LIBRARY
    assert set(extras) == {"train", "data", "reports", "sweep", "serve", "docs", "dev"}
    for extra, packages in EXTRAS.items():
        assert {IMPORTED_AS.get(name, name) for name in names(extras[extra])} == set(packages)
    for extra, requirements in extras.items():
        assert names(requirements) <= names(extras["dev"]), extra
        assert extra == "docs" or names(extras["train"]) <= names(requirements), extra
    assert declared["version"] == metadata.version("vpt-fast")


def installed_by(requirements: Iterable[str]) -> set[str]:
    """Return the installed distributions that the requirements need, directly or indirectly."""
    todo = [Requirement(text) for text in requirements]
    found, seen = set(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            for one in map(Requirement, lines):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    todo.append(one)
    return found


@functools.cache
def owners_of_modules() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def absent_without(requirements: Iterable[str]) -> list[str]:
    """Return the modules missing from an environment with the requirements only."""
    installed = installed_by(requirements)
    return sorted(
        module
        for module, owners in owners_of_modules().items()
        if "vpt-fast" not in owners
        and not any(canonicalize_name(owner) in installed for owner in owners)
    )


# Not None in sys.modules, where scikit-learn looks for pandas.
BLOCKED = """
import sys
from importlib.machinery import PathFinder
absent, found = {absent!r}, PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name in absent else found(name, *where)
"""


def in_its_own_process(code: str, absent: Iterable[str], cwd: Path) -> str:
    """Run Python code that cannot import the modules in `absent`, and return its stdout."""
    blocked = BLOCKED.format(absent=sorted(absent))
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LIBRARY_CODE = """
import timm, torch, vpt_fast
def plain():
    torch.manual_seed(0)
    overlay = {"input_size": [3, 32, 32]}
    return timm.create_model("test_vit", img_size=32, num_classes=3, pretrained_cfg_overlay=overlay)
for method in (vpt_fast.VPTDeep(2), vpt_fast.VAPT(2)):
    model = vpt_fast.prompt_tune(plain(), method)
    images = torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    arguments = {"img_size": 32, "pretrained_cfg_overlay": {"input_size": [3, 32, 32]}}
    folder = vpt_fast.save_adapter(model, method.name, model_args=arguments)
    loaded = vpt_fast.load_adapter(plain(), folder).eval()
    assert torch.equal(loaded(images), model.eval()(images))
    bank = vpt_fast.PromptBank(plain())
    bank.add("task", folder)
    assert bank(images, ["task", "task"])[0].shape == (3,)
    assert vpt_fast.bake(model)(images).shape == (2, 3)
    vpt_fast.remove_prompts(model)
print("done")
"""


def test_the_library_needs_five_packages(declared: dict[str, Any], tmp_path: Path) -> None:
    """And their dependencies; packages of extras are absent even where one of the five has them."""
    optional = {name for packages in EXTRAS.values() for name in packages}
    # torchvision, and through it Pillow, are dependencies of timm.
    absent = {*absent_without(declared["install_requires"]), *optional - {"PIL", "torchvision"}}
    assert {"matplotlib", "sklearn", "scipy", "tqdm", "typer", "pytest", "fastapi"} <= absent
    assert in_its_own_process(LIBRARY_CODE, absent, tmp_path).endswith("done\n")


COMMANDS_CODE = """
import contextlib, io, json
from vpt_fast.__main__ import main
results = []
for arguments in json.loads({commands!r}):
    sys.argv = ["vpt-fast", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run(commands: list[list[Any]], absent: Iterable[str], cwd: Path) -> list[list[Any]]:
    """Run commands; return exit status, stdout and stderr of each."""
    text = json.dumps([[str(word) for word in command] for command in commands])
    lines = in_its_own_process(COMMANDS_CODE.format(commands=text), absent, cwd).splitlines()
    results: list[list[Any]] = json.loads(lines[-1])
    return results


MODEL = ["--model", "test_vit", "--img-size", 32, "--checkpoint", "tiny.pth"]
TRAIN = ["train", "data", *MODEL, "--num-prompts", 2, "--epochs", 1, "-b", 8, "--output", "run"]
IMAGE = "data/test/red/0.png"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_folders(tmp_path / "data", train=3, val=1, test=2)
    write_checkpoint(tmp_path / "tiny.pth")
    return tmp_path


def test_the_train_extra_trains_evaluates_and_predicts(declared: Any, data: Path) -> None:
    commands = [
        ["--version"],
        TRAIN,
        ["eval", "run", "data", "--checkpoint", "tiny.pth"],
        ["predict", "run", IMAGE, "--checkpoint", "tiny.pth"],
        ["export", "run", "--output", "run.pt2", "--checkpoint", "tiny.pth"],
        ["report", "run"],
        ["inspect", "run", IMAGE, "--output", "shares"],
        ["memory", "--model", "test_vit"],
        ["sweep", "data", "--output", "sweep"],
    ]
    extras = declared["extras_require"]
    absent = absent_without([*declared["install_requires"], *extras["train"]])
    results = run(commands, absent, data)
    assert [status for status, _, _ in results] == [0] * 5 + [2] * 4, results
    errors = [error for _, _, error in results[5:]]
    reports = "vpt-fast: error: not installed: matplotlib, sklearn; run: pip install 'vpt-fast[re"
    assert all(error.startswith(reports) and error.count("\n") == 1 for error in errors[:3])
    assert errors[3] == (
        "vpt-fast: error: not installed: matplotlib, optuna, sklearn; "
        "run: pip install 'vpt-fast[sweep]'\n"
    )
    assert not (data / "sweep").exists() and not (data / "shares").exists()


def test_the_reports_extra_draws(declared: Any, data: Path) -> None:
    small = ["--model", "test_vit", "--img-size", 32, "--batch-size", 2, "--prompts", 1]
    commands = [
        TRAIN,
        ["report", "run", "--output", "report.html"],
        ["inspect", "run", IMAGE, "--output", "shares", "--checkpoint", "tiny.pth"],
        ["memory", *small, "--num-prompts", 1, "--output", "memory"],
    ]
    extras = declared["extras_require"]
    absent = absent_without([*declared["install_requires"], *extras["reports"]])
    assert "optuna" in absent and "matplotlib" not in absent
    results = run(commands, absent, data)
    assert [status for status, _, _ in results] == [0] * 4, results
    for name in ("report.html", "shares/attention.png", "memory/memory.png"):
        assert (data / name).is_file(), name


def test_the_sweep_extra_sweeps(declared: Any, data: Path) -> None:
    grid = ["--methods", "linear", "--lrs", 1, "--weight-decays", 0.01, "--seeds", 42]
    small = ["--epochs", 1, "-b", 8, "--num-prompts", 1]
    commands = [["sweep", "data", *MODEL, *grid, *small, "--output", "sweep"]]
    extras = declared["extras_require"]
    absent = absent_without([*declared["install_requires"], *extras["sweep"]])
    assert "optuna" not in absent and "pytest" in absent
    results = run(commands, absent, data)
    assert results[0][0] == 0, results
    assert (data / "sweep" / "sweep.png").is_file()


@pytest.mark.parametrize("missing", ["typer", pytest.param("tensorboard", marks=pytest.mark.full)])
def test_a_missing_command_line_is_named_in_one_line(missing: str, tmp_path: Path) -> None:
    [[status, out, error]] = run([["--help"]], [missing], tmp_path)
    wanted = f"vpt-fast: error: not installed: {missing}; run: pip install 'vpt-fast[train]'\n"
    assert (status, out, error) == (2, "", wanted)


def test_the_demo_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vpt_fast.train.demo import demo

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo.main([]) == 2
    wanted = "error: not installed: sklearn; run: pip install 'vpt-fast[reports]'\n"
    assert capsys.readouterr().err == wanted


def test_a_training_script_names_the_extra_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard; run: pip install 'vpt-fast\[train\]'"):
        MetricsWriter(tmp_path)
    require_extra("train", "tqdm")
    with pytest.raises(MissingExtraError, match="not installed: tensorboard;"):
        require_extra("train")
