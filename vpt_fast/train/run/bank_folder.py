"""Bank of the adapters in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vpt_fast.adapter.files import CONFIG_FILE, read_config
from vpt_fast.backbones.of_adapter import backbone_of_adapter
from vpt_fast.bank import PromptBank
from vpt_fast.train.run.tuned_model import adapter_folder


def open_bank(
    directory: Path,
    names: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_limit: int | None = None,
) -> tuple[PromptBank, list[str]]:
    """Build the backbone of the first usable adapter, and a bank of all wanted ones.

    Args:
        directory: Folder whose folders, adapters or outputs of runs, are tasks of the same name.
        names: Names of the tasks to add; None adds all that the bank does not refuse.
        checkpoint: File with the backbone's weights; None takes timm's, or those of the package.
        device: Device of the bank.
        dtype: Dtype of the backbone's weights.
        memory_limit: Bytes that the tasks may take; others stay in their files until they are
            asked for.

    Returns:
        The bank, and a sentence for each adapter that it refuses.

    Raises:
        FileNotFoundError: If there is no folder, or no checkpoint.
        ValueError: If there is no such adapter, or none that a bank can hold.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    # A process that was killed while saving leaves a hidden folder.
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
            if bank is None or not bank.tasks:  # a refused adapter's model is of no use
                model = backbone_of_adapter(read_config(path), checkpoint).to(device, dtype)
                bank = PromptBank(model, memory_limit, spill=memory_limit is not None)
            bank.add(name, path)
        except Exception as error:  # one bad adapter must not lose the others
            if names is not None:
                raise
            refused.append(f"{name} is left out: {' '.join(str(error).split())}")
    if bank is None or not bank.tasks:
        raise ValueError("; ".join(refused))
    return bank, refused
