"""What a run on a GPU does."""
