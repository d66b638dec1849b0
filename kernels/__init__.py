"""Triton kernels and their launchers. Importing this package needs torch and triton."""
