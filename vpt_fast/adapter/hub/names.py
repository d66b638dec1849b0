"""Adapters by name: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vpt_fast.adapter.files import CONFIG_FILE, FILES

_PREFIX = re.compile(r"^hf[-_]hub:")
_REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def is_on_hub(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is that of a repository, `hf-hub:user/name`."""
    return bool(_PREFIX.match(os.fspath(name)))


def repository(name: str) -> tuple[str, str | None]:
    """Return repository and revision of `user/name`, `hf-hub:user/name` or `...@revision`.

    Raises:
        ValueError: If it is no such name.
    """
    found = _REPOSITORY.fullmatch(_PREFIX.sub("", name, count=1))
    if found is None:
        raise ValueError(f"{name!r} is no repository of the Hub; give user/name")
    return found["repo"], found["revision"]


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter; one on the Hub is downloaded into the Hub's cache.

    Args:
        name: Path of a folder, or `hf-hub:user/name`, with `@revision` if wanted.

    Raises:
        FileNotFoundError: If the repository is missing, or is no adapter of this package.
        OSError: If it cannot be fetched.
        ValueError: If the name is no name of a repository.
    """
    text = os.fspath(name)
    if not is_on_hub(text):
        folder = Path(text)
        if not folder.exists() and _REPOSITORY.fullmatch(text):
            raise FileNotFoundError(
                f"there is no adapter folder {text}; for one on the Hub write hf-hub:{text}"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo, revision = repository(text)
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*FILES]))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {text}, or it is private and `hf auth login` is needed"
        ) from error
    except Exception as error:  # its client raises what its transports raise
        raise OSError(f"{text} cannot be fetched from the Hub: {reason(error)}") from error
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{text} is no adapter: it has no {CONFIG_FILE}")
    return folder


def reason(error: Exception) -> str:
    """Return the first line of an error of the Hub's client."""
    return str(error).strip().partition("\n")[0]
