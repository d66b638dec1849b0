"""Loads of per-channel vectors for tiles of rows."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def load_channels(pointer, channels, mask):
    """Load `channels` [BLOCK_C] for every row of a tile, in fp32, where `mask` [rows, BLOCK_C].

    A tile of pointers has the layout of the rows: each lane loads the 16 bytes that it needs. A
    vector of pointers is spread over all lanes: each loads 2 to 8 bytes, which go through shared
    memory.
    """
    pointers = tl.broadcast_to((pointer + channels)[None, :], mask.shape)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
