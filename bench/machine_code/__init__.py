"""The kernels' machine code, read without a GPU and held against limits."""
