"""Triton kernels and their launchers. All modules but `layouts` need triton."""
