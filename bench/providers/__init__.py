"""The implementations that are compared: one module per kind of work."""
