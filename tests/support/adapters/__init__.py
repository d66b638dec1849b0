"""Adapters made, damaged, and killed while they are saved."""
