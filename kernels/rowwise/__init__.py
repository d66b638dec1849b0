"""Kernels that read rows once and are bound by memory."""
