"""The command line and the package start without PyTorch, and help fits a terminal."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vpt_fast
from vpt_fast import public
from vpt_fast.analysis.activation_memory import DTYPES
from vpt_fast.cli.app import app
from vpt_fast.methods import METHODS, NAMES, find_method, register_method
from vpt_fast.methods.registry import PUBLISHED
from vpt_fast.published import BPT
from vpt_fast.published import __all__ as published_names
from vpt_fast.train.common import names, recipe
from vpt_fast.version import __version__

ROOT = Path(__file__).parents[3]
COMMANDS = (
    *("train", "eval", "predict", "inspect", "export", "push"),
    *("memory", "methods", "report", "sweep"),
)
HEAVY = ("torch", "timm", "torchvision", "matplotlib", "triton", "optuna", "PIL", "numpy")

CODE = """
import json, sys
from vpt_fast.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["vpt-fast", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code
print(json.dumps([name for name in json.loads(%r) if name in sys.modules]))
"""


def in_a_process(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_version_import_nothing_heavy() -> None:
    words = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    out = in_a_process("-c", CODE % json.dumps(HEAVY), json.dumps(words))
    assert json.loads(out.splitlines()[-1]) == []
    assert out.startswith(f"vpt-fast {__version__}\n")
    assert out.count("Usage: vpt-fast") == 1 + len(COMMANDS)


def test_the_package_is_a_program() -> None:
    assert in_a_process("-m", "vpt_fast", "--version") == f"vpt-fast {__version__}\n"


def test_importing_the_package_imports_pytorch_when_a_name_is_used() -> None:
    code = (
        "import sys, vpt_fast; assert 'torch' not in sys.modules;"
        "vpt_fast.prompt_tune; print('torch' in sys.modules, vpt_fast.bank.PromptBank.__name__)"
    )
    assert in_a_process("-c", code) == "True PromptBank\n"


def test_public_names_are_there_however_they_are_asked_for() -> None:
    found: dict[str, object] = {}
    exec("from vpt_fast import *", found)
    assert set(public.__all__) <= found.keys() and set(public.__all__) <= set(dir(vpt_fast))
    assert all(found[name] is getattr(vpt_fast, name) for name in public.__all__)
    assert pickle.loads(pickle.dumps(vpt_fast.VPTDeep)) is vpt_fast.VPTDeep
    with pytest.raises(AttributeError, match="module 'vpt_fast' has no attribute 'nonsense'"):
        vpt_fast.nonsense  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from vpt_fast import nonsense")


def test_published_methods_are_found_by_name_without_the_public_names() -> None:
    code = "from vpt_fast.methods import find_method, method_names; print(*method_names()); "
    out = in_a_process("-c", code + "print(find_method('gate-vpt').__name__)").splitlines()
    assert out == [" ".join(NAMES), "GateVPT"]
    assert {METHODS[name].__name__ for name in PUBLISHED} == set(published_names)
    assert all(find_method(name).name == name for name in NAMES)


def test_a_published_method_keeps_its_name() -> None:
    class Settings(vpt_fast.PromptMethod):
        pass

    Settings.__dataclass_params__ = BPT.__dataclass_params__  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="BPT is registered as 'bpt' already"):
        register_method("bpt", Settings)


def test_names_without_pytorch_are_those_of_pytorch() -> None:
    assert list(recipe.AMP_DTYPES) == list(names.AMP_DTYPES)
    assert {str(value) for value in recipe.AMP_DTYPES.values()} == {
        "torch.float32",
        "torch.bfloat16",
        "torch.float16",
    }
    assert DTYPES == recipe.AMP_DTYPES


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_groups_and_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = CliRunner().invoke(app, [command, "--help"]).stdout
    assert max(map(len, out.splitlines())) <= 80
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    order = ["Arguments", "Data", "Model", "Method", "Optimisation", "Augmentation"]
    order += ["Speed and memory", "Output", "Options"]
    assert groups == [name for name in order if name in groups]
    if command in ("train", "sweep"):
        assert out.endswith("\nOptions:\n  --help  Show this message and exit.\n")
    if command in ("eval", "predict", "inspect", "export", "push", "report"):
        assert "hf-hub:user/name" in out
    if command == "train":
        assert "spt-mean" in out and "hf, webdataset" in " ".join(out.split())
        assert groups == order
        assert out.startswith("Usage: vpt-fast train [OPTIONS] DIR\n")
