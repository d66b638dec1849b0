"""Handwritten digits, in two minutes."""
