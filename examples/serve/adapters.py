"""Fills a bank with the adapters of a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from vpt_fast.adapter import CONFIG_FILE, read_config
from vpt_fast.bank import PromptBank
from vpt_fast.train.backbone import backbone_of_adapter
from vpt_fast.train.tuned_model import adapter_folder


def open_bank(
    directory: Path,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_limit: int | None = None,
) -> tuple[PromptBank, list[str]]:
    """Builds the backbone of the first adapter and adds all of them.

    Args:
        directory: Its folders, adapters or outputs of runs, become the tasks of their names.
        checkpoint: The backbone's weights; None takes timm's, or those of the package.
        device: Where the bank is to run.
        dtype: Of the backbone's weights.
        memory_limit: Bytes that the tasks may take; those that do not fit wait in their files.

    Returns:
        The bank, and a sentence for every folder whose adapter it refuses.

    Raises:
        FileNotFoundError: If there is no folder, or no checkpoint.
        ValueError: If there is no adapter that can be served.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    folders = {path.name: adapter_folder(path) for path in sorted(directory.iterdir())}
    folders = {name: path for name, path in folders.items() if (path / CONFIG_FILE).is_file()}
    if not folders:
        raise ValueError(
            f"{directory} holds no adapters; expected {directory}/<task>/{CONFIG_FILE}, as "
            "`vpt-fast train --output` writes it"
        )
    model = backbone_of_adapter(read_config(next(iter(folders.values()))), checkpoint)
    bank = PromptBank(model.to(device, dtype), memory_limit, spill=memory_limit is not None)
    refused = []
    for name, path in folders.items():
        try:
            bank.add(name, path)
        except (ValueError, OSError) as error:
            refused.append(f"{name} is not served: {error}")
    if not bank.tasks:
        raise ValueError("; ".join(refused))
    return bank, refused
