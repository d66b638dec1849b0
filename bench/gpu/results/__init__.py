"""What a run on a GPU leaves."""
