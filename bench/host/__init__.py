"""The host's time of a step."""
