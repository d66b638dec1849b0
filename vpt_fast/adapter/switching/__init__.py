"""Several adapters on one model: one is active, the others wait beside it."""
