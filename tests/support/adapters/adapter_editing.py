"""Edited adapters whose checksums are correct."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vpt_fast.adapter.files import (
    CONFIG_FILE,
    FINGERPRINT_FILE,
    TENSORS_FILE,
    config_sha256,
    config_texts,
)

Change = Callable[[dict[str, Any]], Any]


def rewrite_config(directory: Path, change: Change) -> None:
    """Apply a change to the configuration, and update its checksum."""
    config = {}
    for name in (CONFIG_FILE, FINGERPRINT_FILE):
        config |= json.loads((directory / name).read_text("utf-8"))
    change(config)
    if config.get("format_version") in (1, 2):  # one file
        config["config_sha256"] = config_sha256(config)
        (directory / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
        (directory / FINGERPRINT_FILE).unlink()
        return
    for name, text in config_texts(config).items():
        (directory / name).write_text(text, "utf-8")


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply a change to the tensors, and update both checksums: only the content is wrong."""
    path = directory / TENSORS_FILE
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite_config(directory, lambda config: config.update(tensors_sha256=digest))
