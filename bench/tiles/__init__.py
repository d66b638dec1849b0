"""Tiles of the attention kernels: candidates, times, the choice."""
