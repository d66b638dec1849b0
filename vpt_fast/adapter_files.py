"""The two files of an adapter: their names, and how they are read and checked for damage."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "method": (dict,),
    "model": (dict,),
    "input": (dict,),
    "class_names": (list, type(None)),
    "versions": (dict,),
    "fingerprint": (dict,),
    "tensors_sha256": (str,),
}


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise ValueError if a value is not finite; `where` says whose tensors they are."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of {where} has values that are not finite")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter's configuration, checked for completeness.

    Raises:
        FileNotFoundError: the directory or one of its two files is not there.
        ValueError: the configuration is damaged or of a newer format.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not an adapter: it has no {name}")
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds {type(config).__name__}, not an object")
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, this vpt_fast reads up to {FORMAT_VERSION}; upgrade it"
        )
    for key, types in _CONFIG_TYPES.items():
        if key not in config:
            raise ValueError(f"{path} is damaged: it has no {key!r}")
        if not isinstance(config[key], types):
            raise ValueError(f"{path} is damaged: {key} is {config[key]!r}")
    return config


def read_tensors(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The adapter's tensors by name, on the CPU.

    Args:
        directory: of the adapter.
        config: what `read_config` returned for it.

    Raises:
        ValueError: the file is damaged, is not the configuration's, or has values that are not
            finite.
    """
    path = directory / TENSORS_FILE
    # Read once: a mapped file would change what is in memory when it is written to.
    content = path.read_bytes()
    if sha256(content) != config["tensors_sha256"]:
        raise ValueError(f"{path} is damaged or not the file that {CONFIG_FILE} belongs to")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} of {path} is {tensor.dtype}, not a type that is trained")
    check_finite(tensors, str(path))
    return tensors
