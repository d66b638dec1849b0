"""What is counted without running: launches, FLOP, bytes; and a model of the time."""
