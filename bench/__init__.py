"""Benchmarks: what can run is timed, what cannot is judged from its machine code."""
