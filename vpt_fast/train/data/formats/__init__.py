"""Formats of data sets on disk: how each is told, and how it is read."""
