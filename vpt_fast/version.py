"""The version, which `setup.py` reads too: this module imports nothing."""

__version__ = "0.1.0"
"""Version of the package, by semantic versioning."""
