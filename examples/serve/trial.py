"""Untrained adapters, images and a server process to try the server with."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from vpt_fast import VAPT, LinearProbe, VPTDeep, prompt_tune, save_adapter, trainable_parameters
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, demo_backbone
from vpt_fast.methods import Method

ROOT = Path(__file__).resolve().parents[2]
METHODS: tuple[Method, ...] = (VPTDeep(num_prompts=3), VAPT(num_prompts=4), LinearProbe())
START_SECONDS = 60
STARTED = re.compile(r"Uvicorn running on (http://\S+)")


def write_adapters(directory: Path, count: int = 6) -> Path:
    """Write adapters of the demo backbone with random values, which all answer differently.

    Args:
        directory: Folder for the adapters task-0, task-1, ...
        count: Number of adapters; methods alternate, and each adapter has one class more than the
            one before.

    Returns:
        `directory`.
    """
    for index in range(count):
        torch.manual_seed(index)
        classes = 3 + index
        model = prompt_tune(demo_backbone(classes), METHODS[index % len(METHODS)])
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_adapter(
            model,
            directory / f"task-{index}",
            class_names=[f"class {index}.{i}" for i in range(classes)],
            model_args=DEMO_ARGS,
            checkpoint=DEMO_CHECKPOINT.name,
        )
    return directory


def picture(seed: int, size: tuple[int, int] = (48, 40), file_format: str = "PNG") -> bytes:
    """Return an image file with a smooth random picture of `size` (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


@contextmanager
def server_process(bank: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server on a free port, yield its process and address, and stop it at the end.

    Args:
        bank: Folder of adapters.
        options: Further options of `python -m examples.serve`.

    Raises:
        RuntimeError: If it does not start.
    """
    command = [sys.executable, "-m", "examples.serve", "--bank", str(bank), "--port", "0"]
    # Not a pipe, which would block the server once it is full.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options], cwd=ROOT, stdout=log, stderr=log
        )
        try:
            yield process, _address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    said, end = "", time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        over = process.poll() is not None
        log.seek(0)
        said = log.read()
        started = STARTED.search(said)
        if started:
            return started.group(1)
        if over:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {said}")
