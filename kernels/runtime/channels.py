"""Per-channel vectors as tiles of rows read them."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def load_channels(pointer, channels, mask):
    """Values of `channels` [BLOCK_C] for every row of a tile, fp32, where `mask` [rows, BLOCK_C].

    A tile of pointers is spread over the lanes as the rows are: each loads the 16 bytes that it
    needs. A vector of pointers is spread over all lanes, which leaves 2 to 8 bytes to each, and a
    trip through shared memory.
    """
    pointers = tl.broadcast_to((pointer + channels)[None, :], mask.shape)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
