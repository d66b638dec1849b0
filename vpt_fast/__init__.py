"""Fast visual prompt tuning for timm vision transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vpt_fast.version import __version__ as __version__

if TYPE_CHECKING:
    from vpt_fast.public import *  # noqa: F403
    from vpt_fast.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Import the public names, PyTorch and timm when one of the names is used (PEP 562)."""
        if name == "__all__" or not name.startswith("_"):
            public = import_module("vpt_fast.public")
            globals().update({key: getattr(public, key) for key in (*public.__all__, "__all__")})
            if name in globals():  # or a module of the package, which is there once it is imported
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*__getattr__("__all__"), *globals()})
