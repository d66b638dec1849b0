"""Work of `vpt-fast push`."""

from __future__ import annotations

from pathlib import Path

from vpt_fast import push_adapter
from vpt_fast.train.run.tuned_model import adapter_folder


def push(adapter: Path, name: str, private: bool | None, message: str | None) -> str:
    """Upload an adapter and return the address of the commit.

    Args:
        adapter: Folder of the adapter, or the output folder of its run.
        name: Repository, "user/name" or "user/name@branch".
        private: Whether a new repository is private; None takes the account's default.
        message: Message of the commit, or None.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged, or the name is no repository's.
        OSError: If the Hub refuses or cannot be reached.
    """
    return push_adapter(adapter_folder(adapter), name, private=private, message=message)
