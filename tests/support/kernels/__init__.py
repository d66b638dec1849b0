"""Kernels executed on the CPU, and what they are held against."""
