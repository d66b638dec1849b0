"""Work that is recorded once and replayed: CUDA graphs of a model's blocks, or of a whole step."""
