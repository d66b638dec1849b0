"""Changes of a model: made whole or not at all, undone, and known to models that share parts."""
