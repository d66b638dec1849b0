"""Fused blocks: read from their modules, checked in every call, and run as one function."""
