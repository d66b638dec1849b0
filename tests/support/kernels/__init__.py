"""Kernels executed on the CPU, and recorded launches."""
