"""Makes keys of Triton's cache the same in every process."""

from __future__ import annotations

import importlib
import pkgutil

from triton.runtime.jit import JITFunction

import vpt_fast.kernels


def stable_keys() -> None:
    """Make Triton's cache keys the same in every process that calls this first.

    Up to Triton 3.6 a function's key includes the globals of the functions that it calls only if
    their keys were computed before, so it depends on what was launched earlier in the process.
    """
    functions: dict[str, JITFunction] = {}
    root = vpt_fast.kernels
    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, JITFunction):
                functions[f"{value.__module__}.{value.__name__}"] = value
    for name in sorted(functions):
        functions[name].cache_key  # noqa: B018  reading it computes it
