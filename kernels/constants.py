"""Constants that kernels, launches and references share. This module needs no triton."""

LOG2_E = 1.4426950408889634
"""log2(e): the kernels' softmax takes powers of 2."""

MASK_VALUE = -100.0
"""Swin's mask of scores between tokens that are neighbours only because of the cyclic shift."""

LARGEST_TILE = 256
"""Most rows of a tile: an index may be computed that far beyond a tensor's end."""

MAX_HEAD_DIM = 128
"""Most channels of a head in the kernels."""
