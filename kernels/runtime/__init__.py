"""What every kernel is launched with: plans, memory, chunks of a batch, loads."""
