"""Python blocks of the documentation run, and options of its commands exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from PIL import Image
from support.doc_pages import NAMES, PAGES, ROOT, blocks, commands
from typer.testing import CliRunner

import vpt_fast
from vpt_fast.cli.app import app

EVERY = list(zip(PAGES, NAMES, strict=True))
PYTHON = [
    (page, name)
    for page, name in EVERY
    # Those programs are run by tests/integrations.
    if blocks(page.read_text(), "python") and page.parent.name != "integrations"
]
SHELL = [(page, name) for page, name in EVERY if blocks(page.read_text(), "sh")]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
UNCHECKED = {"curl", "tar", "export"}
"""Commands that are none of ours."""

create_model = timm.create_model


def _small_model(name: str, pretrained: bool = False, **options: Any) -> Any:
    """Build a small ViT of the same class, whose values depend on the parameters' names only."""
    model = create_model(name, pretrained=False, **{**SMALL, **options})
    for parameter_name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def _adapters() -> None:
    """Write the adapters that the page about banks reads."""
    methods = {"pets": vpt_fast.VPTDeep(10), "birds": vpt_fast.VAPT(5)}
    for (name, method), classes in zip(methods.items(), (37, 200), strict=True):
        model = timm.create_model("vit_base_patch16_224", num_classes=classes)
        vpt_fast.save_adapter(vpt_fast.prompt_tune(model, method), f"{name}-adapter")


def _program() -> None:
    """Write the file that the page about export reads."""
    model = timm.create_model("vit_base_patch16_224", num_classes=37)
    baked = vpt_fast.bake(vpt_fast.prompt_tune(model, vpt_fast.VPTDeep(10)))
    program = torch.export.export(baked, (torch.rand(3, 3, 32, 32),))
    torch.export.save(program, "photos.pt2", extra_files={"task.json": "{}"})


PREPARED: dict[str, Callable[[], None]] = {"docs/bank.md": _adapters, "docs/export.md": _program}


@pytest.mark.parametrize(("page", "name"), PYTHON, ids=[name for _, name in PYTHON])
def test_the_python_of_a_page_runs(
    page: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run in order, in one namespace; small random models replace pretrained ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", _small_model)
    PREPARED.get(name, lambda: None)()
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "timm": timm,
        "torch": torch,
        "vpt_fast": vpt_fast,
        "images": torch.rand(3, 3, 32, 32),
        "labels": torch.tensor([0, 1, 2]),
    }
    for number, block in enumerate(blocks(page.read_text(), "python")):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def _options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]


def _check_cli(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    while words[0] == "--import":
        words = words[2:]
    command = group.commands[words[0]]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert set(_options(words[1:])) <= known, words


def _check_module(name: str, words: list[str]) -> None:
    if name == "vpt_fast":
        return _check_cli(words)
    if name == "pytest":
        (path,) = (word for word in words if word.endswith(".py"))
        assert (ROOT / path).is_file(), path
        known = (ROOT / "bench" / "conftest.py").read_text() + "--benchmark-enable"
    else:
        known = _help(name, needed=bool(_options(words)))
    for option in _options(words):
        assert option in known, (name, option)
    return None


def _help(name: str, needed: bool) -> str:
    """Return the output of `python -m name --help`; a program without options is not run."""
    spec = importlib.util.find_spec(f"{name}.__main__" if _is_package(name) else name)
    assert spec is not None and spec.origin is not None, name
    files = [Path(spec.origin)]
    if files[0].name == "__main__.py":
        files = sorted(files[0].parent.glob("*.py"))
    if not any(word in file.read_text() for file in files for word in ("argparse", "typer")):
        assert not needed, name
        return ""
    out = io.StringIO()
    with _arguments("--help"), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None), name
    return out.getvalue()


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name}"
    return spec.submodule_search_locations is not None


@contextlib.contextmanager
def _arguments(*words: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *words])
        yield


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "name"), SHELL, ids=[name for _, name in SHELL])
def test_the_commands_of_a_page_exist(page: Path, name: str) -> None:
    """Programs, targets and extras exist, and take every option."""
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()
    for words in commands(page.read_text()):
        program, *rest = words
        if program == "vpt-fast":
            _check_cli(rest)
        elif program == "python":
            assert rest[0] == "-m", words
            _check_module(rest[1], rest[2:])
        elif program == "torchrun":
            at = rest.index("-m")
            _check_module(rest[at + 1], rest[at + 2 :])
        elif program == "make":
            assert f"\n{rest[0]}:" in makefile, words
        elif program == "pip":
            (extra,) = re.findall(r"\[(\w+)\]", words[-1])
            assert f'"{extra}":' in setup, words
        else:
            assert program in UNCHECKED, words


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the quickstart's folder of images, and two images, in the working folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number, label in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 100, (40, 40, 3), generator=generator) + 100 * number
                picture = Image.fromarray(pixels.byte().numpy())
                picture.save(folder / f"{index}.jpg")
    shutil.copy(tmp_path / "photos/test/dark/0.jpg", tmp_path / "some.jpg")
    shutil.copy(tmp_path / "photos/test/light/0.jpg", tmp_path / "another.jpg")
    return tmp_path


def _stand_in(words: list[str]) -> list[str]:
    """Return the same command with the demo's small backbone, for one epoch."""
    words = ["vpt_fast_demo" if word.startswith("vit_") else word for word in words]
    words = [word for word in words if word not in ("--pretrained", "--overwrite")]
    return [*words, "--epochs", "1", "-b", "4", "-j", "0"] if words[0] == "train" else words


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_first_commands_run(name: str, photos: Path) -> None:
    """The quickstart's commands, on a small folder of images."""
    ran = 0
    for words in commands((ROOT / name).read_text()):
        if words[0] != "vpt-fast":
            continue
        result = CliRunner().invoke(app, _stand_in(words[1:]))
        assert result.exit_code == 0, (words, result.output)
        ran += 1
    assert ran == 4
