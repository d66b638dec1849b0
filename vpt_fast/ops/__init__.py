"""Operations, one folder each: kernels on CUDA, a reference elsewhere, operators to be traced."""
