"""Numbers that kernels, their launches and the references share. This module needs no triton."""

LOG2_E = 1.4426950408889634
"""log2(e): the kernels' softmax is one of powers of 2."""

FAR = -100.0
"""What Swin adds to scores of tokens that only the roll has made neighbours."""

LARGEST_TILE = 256
"""Most rows of a tile: how far beyond a tensor's end an index may be computed."""

MAX_HEAD_DIM = 128
"""Most channels of a head that the kernels take."""
