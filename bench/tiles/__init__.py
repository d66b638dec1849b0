"""Tiles of the attention kernels: candidates, measured times, and the choice."""
