"""Version of the package; `setup.py` reads it too, so this module imports nothing."""

__version__ = "0.1.0"
"""Version of the package, by semantic versioning."""
