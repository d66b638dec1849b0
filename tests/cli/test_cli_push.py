"""`vpt-fast push`, and adapters on the Hub in the other commands, against a stand-in of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.adapters import hub as stand_in
from test_cli import call, error_of

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from vpt_fast.cli.app import app
found = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([(one.exit_code, one.stdout, one.stderr) for one in found]))
"""


@pytest.fixture
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.running() as found:
        yield found


def commands(hub: stand_in.Hub, home: Path, *words: list[Any], token: str = "hf_test") -> Any:
    """Run commands in a process whose Hub is the stand-in; return the results."""
    own = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([[str(w) for w in one] for one in words])],
        cwd=home.parent, env={**os.environ, **own}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_pushed_is_used_by_its_name(hub, run, folder, checkpoint, tmp_path) -> None:
    image, weights = folder / "test" / "red" / "0.png", ["--checkpoint", checkpoint]
    name, page = "hf-hub:user/colours", tmp_path / "page.html"
    pushed, predicted, evaluated, inspected, exported, reported = commands(
        hub, tmp_path / "home",
        ["push", run[0], "user/colours", "--private", "--message", "colours, four epochs"],
        ["predict", name, image, *weights],
        ["eval", name, folder, *weights],
        ["inspect", name, image, *weights, "--output", tmp_path / "inspected"],
        ["export", name, *weights, "--output", tmp_path / "colours.pt2"],
        ["report", name, *weights, "--data", folder, "--output", page],
    )  # fmt: skip
    assert pushed[:2] == [
        0,
        f"{hub.address}/user/colours/commit/{hub.sha('user/colours', 'main')}\n",
    ]
    assert hub.private == {"user/colours"}
    files = hub.repos["user/colours"]["main"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[file] == (run[0] / "best" / file).read_bytes()
    assert name in files["README.md"].decode()

    assert predicted[:2] == [0, call("predict", run[0], image, *weights).stdout]
    assert evaluated[:2] == [0, call("eval", run[0], folder, *weights).stdout]
    assert inspected[0] == 0 and (tmp_path / "inspected" / "attention.csv").is_file(), inspected
    assert exported[0] == 0 and (tmp_path / "colours.pt2").is_file(), exported
    assert reported[0] == 0 and "colours: test, 12 images" in reported[1], reported
    assert f"<h1>{name}</h1>" in page.read_text(encoding="utf-8")


def test_refusals_are_one_line(hub, run, tmp_path) -> None:
    refused, missing, nothing = commands(
        hub, tmp_path / "home",
        ["push", run[0], "user/colours"],
        ["predict", "hf-hub:user/none", __file__],
        ["push", tmp_path / "nothing", "user/colours"],
        token="hf_wrong",
    )  # fmt: skip
    for (status, out, line), text in (
        (refused, "user/colours cannot be pushed to the Hub: "),
        (missing, "the Hub has no hf-hub:user/none, or it is private and `hf auth login` is"),
        (nothing, f"{tmp_path / 'nothing'}"),
    ):
        assert (status, out) == (2, "") and line.startswith("vpt-fast: error: ")
        assert line.count("\n") == 1 and text in line, line
    assert hub.repos == {}
    message = error_of(call("push", run[0], "no repository"))
    assert message == "vpt-fast: error: 'no repository' is no repository of the Hub; give user/name"
