"""Adapters that are written, edited and damaged, and saves that are killed."""
