"""The files of an adapter: their names, reading, and checks for damage.

Format 2 added a checksum of the configuration, the description of the architecture and the outputs
for a fixed image; adapters of format 1 are read without these checks. Format 3 moved what people do
not read to a file of its own, and added a model card, which nothing reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vpt_fast.adapter.config import check_config

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FINGERPRINT_FILE = "adapter_fingerprint.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, FINGERPRINT_FILE, TENSORS_FILE, CARD_FILE)
FORMAT_VERSION = 3
IN_FINGERPRINT_FILE = ("architecture", "fixed_image", "fingerprint")
"""Keys of the configuration that stand in `FINGERPRINT_FILE`."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Types of buffers beside those that are trained."""
_PATIENCE = 5.0
"""Seconds for which an adapter is read again while it is being replaced."""


def sha256(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def config_sha256(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a configuration's values; their order and white space do not count."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def config_texts(config: dict[str, Any]) -> dict[str, str]:
    """Return the content of `CONFIG_FILE` and `FINGERPRINT_FILE`, by name, with the checksum."""
    for_people = {key: value for key, value in config.items() if key not in IN_FINGERPRINT_FILE}
    for_people["config_sha256"] = config_sha256(config)
    rest = {key: config[key] for key in IN_FINGERPRINT_FILE if key in config}
    return {
        CONFIG_FILE: f"{json.dumps(for_people, indent=2)}\n",
        FINGERPRINT_FILE: f"{json.dumps(rest, separators=(',', ':'))}\n",
    }


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise ValueError if a value is not finite; `where` names the owner of the tensors."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of {where} has values that are not finite")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the adapter's configuration, checked value by value (see `check_config`).

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the configuration is damaged, was changed, or has a newer format.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not an adapter: it has no {name}")
    path = directory / CONFIG_FILE
    config = _read_json(path)
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, this vpt_fast reads up to {FORMAT_VERSION}; upgrade it"
        )
    if "peft_type" in config:
        raise ValueError(f"{path} is an adapter of PEFT's; load it with peft.PeftModel")
    if version not in (1, 2):
        rest = _read_json(directory / FINGERPRINT_FILE)
        config |= {key: rest[key] for key in IN_FINGERPRINT_FILE if key in rest}
    try:
        check_config(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if version != 1 and config.get("config_sha256") != config_sha256(config):
        raise ValueError(
            f"{path} is damaged, or was changed after it was saved: its checksum does not fit; "
            "load the original, change the model, and save it again"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not an adapter: it has no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of one saved adapter, even while it is being replaced.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If one of them is damaged, or they do not belong together.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        before = _identity(directory)
        try:
            config = read_config(directory)
            return config, read_tensors(directory, config)
        except (ValueError, OSError):
            if _identity(directory) == before or time.monotonic() > end:
                raise


def _identity(directory: Path) -> tuple[int, int] | None:
    """Return what changes when the folder is replaced; None if there is none."""
    try:
        found = os.stat(directory)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_tensors(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the adapter's tensors by name, on the CPU.

    Args:
        directory: Folder of the adapter.
        config: Configuration that `read_config` returned for it.

    Raises:
        ValueError: If the file is damaged, does not belong to the configuration, or has values
            that are not finite.
    """
    path = directory / TENSORS_FILE
    # Read, not mapped: writing to a mapped file would change the tensors in memory.
    content = path.read_bytes()
    if sha256(content) != config["tensors_sha256"]:
        raise ValueError(f"{path} is damaged or not the file that {CONFIG_FILE} belongs to")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES + _COUNTS:
            raise ValueError(f"{name} of {path} is {tensor.dtype}, not a type that is trained")
    check_finite(tensors, str(path))
    return tensors
