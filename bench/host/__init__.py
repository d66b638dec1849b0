"""The host's time of a step, measured without a GPU."""
