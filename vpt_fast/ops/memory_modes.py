"""Memory modes: what a block saves for backward; the rest is recomputed there.

Saved per token and block, in rows of D channels (for an MLP of 4 D):

    speed      10   input, qkv (3), attention's output, the sum after attention, fc1's output (4)
    balanced    6   all but fc1's output
    lean        3   the input, attention's output and the sum after attention
    minimal     1   the input

Row statistics (a few fp32 numbers per token) are saved in every mode.
"""

from __future__ import annotations

MEMORY_MODES = ("speed", "balanced", "lean", "minimal")


def check_memory_mode(memory: str) -> str:
    """Return `memory`; raise ValueError if there is no such mode."""
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}; got {memory!r}")
    return memory
