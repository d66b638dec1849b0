"""Reports of the kernels of each operation: figures, limits, presentation."""
