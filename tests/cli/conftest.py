"""Images, weights and a finished run, shared by tests of the command line."""

from __future__ import annotations

import pytest
from support.pictures import make_folders, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("colours"), train=8, val=3, test=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def run(folder, checkpoint, tmp_path_factory):
    """Run a training; return its output folder and result."""
    from test_cli import train

    output = tmp_path_factory.mktemp("runs") / "deep"
    result = train(folder, checkpoint, output, "--epochs", 4, "--num-prompts", 3)
    assert result.exit_code == 0, result.output
    return output, result
