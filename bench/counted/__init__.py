"""What is counted without running: launches, FLOP and bytes; and a model of the time."""
