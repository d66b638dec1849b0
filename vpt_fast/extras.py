"""What the extras of `setup.py` bring, and what is said where one of them is not installed."""

from __future__ import annotations

from importlib.util import find_spec

_TRAIN = ("PIL", "tensorboard", "torchvision", "tqdm", "typer")

EXTRAS = {
    "train": _TRAIN,
    "data": (*_TRAIN, "datasets"),
    "reports": (*_TRAIN, "jinja2", "matplotlib", "sklearn"),
    "sweep": (*_TRAIN, "matplotlib", "optuna", "sklearn"),
}
"""Names that the packages of an extra are imported by."""


class MissingExtraError(ImportError):
    """Packages of an extra are not installed; the message says how to install them."""


def require_extra(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: Key of `EXTRAS`.
        packages: Those that are needed, where it is not all of the extra.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    missing = [name for name in packages or EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"not installed: {', '.join(missing)}; run: pip install 'vpt-fast[{extra}]'"
        )
