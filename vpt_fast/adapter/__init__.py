"""Adapters: what was trained, in a folder of small files."""
