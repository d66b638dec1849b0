"""What a run on a GPU does: comparisons, checks, and other jobs."""
