"""Push an adapter to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from vpt_fast.adapter.files import CARD_FILE, FILES, read_adapter
from vpt_fast.adapter.hub.card import PLACE, write_card
from vpt_fast.adapter.hub.names import is_on_hub, local_folder, reason, repository


def push_adapter(
    directory: str | os.PathLike[str],
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a saved adapter to a repository of the Hub, which is created if it is missing.

    The folder's model card goes with it, with the repository's name in its example; an adapter
    without one (of an earlier version) is given one.

    Args:
        directory: Folder that `save_adapter` wrote.
        name: Repository, "user/name"; a branch may follow, "user/name@branch".
        private: Whether a new repository is private; None takes the account's default.
        token: Token of the Hub; None takes the one that `hf auth login` stored.
        message: Message of the commit.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged, one of its files is a link, or the name is no
            repository's.
        OSError: If the Hub refuses or cannot be reached.
    """
    repo, branch = repository(name)
    folder = local_folder(directory)
    if not is_on_hub(directory):  # the Hub's cache is made of links
        _check_links(folder)
    read_adapter(folder)
    if not (folder / CARD_FILE).is_file():
        write_card(folder)
    place = f"hf-hub:{repo}" if branch is None else f"hf-hub:{repo}@{branch}"
    card = (folder / CARD_FILE).read_text(encoding="utf-8").replace(PLACE, place)
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [
        CommitOperationAdd(path, str(folder / path))
        for path in FILES
        if path != CARD_FILE and (folder / path).is_file()
    ]
    files.append(CommitOperationAdd(CARD_FILE, card.encode()))
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        text = message or f"Upload adapter {folder.resolve().name}"
        commit = api.create_commit(repo, files, commit_message=text, revision=branch)
    except Exception as error:  # its client raises what its transports raise
        raise OSError(f"{repo} cannot be pushed to the Hub: {reason(error)}") from error
    return str(commit.commit_url)


def _check_links(folder: Path) -> None:
    """Raise ValueError if a file is a link, which could lead to any file of this machine."""
    for name in FILES:
        if (folder / name).is_symlink():
            raise ValueError(f"{folder / name} is a link; put the file itself there")
