"""Kernels that go over rows once, bound by memory."""
