"""Measures the package: what runs is timed, what cannot run is judged from its machine code."""
