"""The machine and the versions that benchmark results depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "timm", "numpy")


def facts(gpu: bool | None = None) -> dict[str, str]:
    """Return device, cores and threads, operating system, versions and commit.

    Args:
        gpu: Whether the device is the GPU; by default if there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "cores": str(len(_affinity())),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **({"cuda": str(torch.version.cuda or torch.version.hip)} if gpu else {}),
        "commit": _commit(),
    }


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_stem(known: Mapping[str, str]) -> str:
    """Return a file name for results with these facts, one per machine and set of versions."""
    kind = "gpu" if "cuda" in known else f"cpu-{known['threads']}-threads"
    parts = [known["device"], kind, *(f"{name}-{known[name]}" for name in ("torch", "timm"))]
    return re.sub(r"[^a-z0-9._]+", "-", "_".join(parts).lower())


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "none"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
