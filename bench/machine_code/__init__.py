"""The kernels' machine code, read without a GPU and compared with limits."""
