"""Operators of PyTorch, one folder per operation: kernels on CUDA, a reference elsewhere."""
