"""Work that is recorded once and replayed: CUDA graphs of blocks, or of a whole step."""
