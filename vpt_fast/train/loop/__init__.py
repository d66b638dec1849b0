"""Steps, epochs, evaluation, checkpoints."""
