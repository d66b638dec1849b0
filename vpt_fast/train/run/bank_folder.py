"""A bank of the adapters in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vpt_fast.adapter.files import CONFIG_FILE, read_config
from vpt_fast.bank import PromptBank
from vpt_fast.train.backbones.build import backbone_of_adapter
from vpt_fast.train.run.tuned_model import adapter_folder


def open_bank(
    directory: Path,
    names: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_limit: int | None = None,
) -> tuple[PromptBank, list[str]]:
    """Builds the backbone of the first adapter that can be held, and adds those that are wanted.

    Args:
        directory: Its folders, adapters or outputs of runs, are the tasks of their names.
        names: Of the tasks that are added; None adds all that the bank does not refuse.
        checkpoint: The backbone's weights; None takes timm's, or those of the package.
        device: Where the bank is to run.
        dtype: Of the backbone's weights.
        memory_limit: Bytes that the tasks may take; those that do not fit wait in their files.

    Returns:
        The bank, and a sentence for every folder whose adapter it refuses.

    Raises:
        FileNotFoundError: If there is no folder, or no checkpoint.
        ValueError: If there is no such adapter, or none that a bank holds.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    # A saving that was killed leaves a hidden folder.
    paths = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    folders = {path.name: adapter_folder(path) for path in paths}
    folders = {name: path for name, path in folders.items() if (path / CONFIG_FILE).is_file()}
    if not folders:
        raise ValueError(
            f"{directory} holds no adapters; expected {directory}/<task>/{CONFIG_FILE}, as "
            "`vpt-fast train --output` writes it"
        )
    for name in names or ():
        if name not in folders:
            raise ValueError(f"{directory} has no task {name!r}; it has {', '.join(folders)}")
    wanted = folders if names is None else {name: folders[name] for name in names}
    bank: PromptBank | None = None
    refused = []
    for name, path in wanted.items():
        try:
            if bank is None or not bank.tasks:  # of an adapter that is refused its model is no use
                model = backbone_of_adapter(read_config(path), checkpoint).to(device, dtype)
                bank = PromptBank(model, memory_limit, spill=memory_limit is not None)
            bank.add(name, path)
        except Exception as error:  # whatever one configuration says, the other adapters are held
            if names is not None:
                raise
            refused.append(f"{name} is left out: {' '.join(str(error).split())}")
    if bank is None or not bank.tasks:
        raise ValueError("; ".join(refused))
    return bank, refused
