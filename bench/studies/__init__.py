"""Single questions, each with its answer."""
