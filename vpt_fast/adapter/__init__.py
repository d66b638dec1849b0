"""Adapters: what was trained, in a folder of two files."""
