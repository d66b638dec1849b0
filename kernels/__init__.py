"""Triton kernels and their launchers.

`constants`, `attention/layouts`, `attention/checks`, `window_attention/checks` and `experts/inputs`
need no triton.
"""
