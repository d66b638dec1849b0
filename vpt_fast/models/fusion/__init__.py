"""Blocks in a row as one function: read from their modules, checked, and run."""
