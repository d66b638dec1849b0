"""Checkpoint of a run after an epoch: written atomically, resumed bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.train.common.digest import digest

FILE = "checkpoint.pt"
VERSION = 2

State = dict[str, Any]


def save_checkpoint(directory: Path, state: State) -> None:
    """Write a checkpoint atomically: a process that is killed meanwhile leaves the earlier one.

    Args:
        directory: Existing folder.
        state: Tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_file(directory / FILE, "wb") as file:
        try:
            torch.save({"version": VERSION, "sha256": digest(state), **state}, file)
        except RuntimeError as error:  # PyTorch's writer raises this for a full disk
            raise OSError(f"{directory / FILE} cannot be written; is the disk full?") from error


def load_checkpoint(directory: Path) -> State | None:
    """Read the state that `save_checkpoint` wrote; None if there is none.

    Raises:
        ValueError: If a bit of the file's values differs from what was written, or the file is of
            another version.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}); remove it to start again"
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path} is not a checkpoint of this version; remove it to start again")
    del state["version"]
    if state.pop("sha256", None) != digest(state):
        raise ValueError(f"{path} is damaged: its checksum is another; remove it to start again")
    return state


def random_state(batches: DataLoader) -> State:
    """Return the states of all generators: Python's, NumPy's, PyTorch's, and the loader's."""
    numpy: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy
    version, internal, next_gauss = random.getstate()
    generator = getattr(batches, "generator", None)
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "order": None if generator is None else generator.get_state(),
    }


def restore_random_state(state: State, batches: DataLoader) -> None:
    """Restore the states of all generators that `random_state` returned."""
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator = getattr(batches, "generator", None)
    if state["order"] is not None and generator is not None:
        generator.set_state(state["order"])
