"""What a run on a GPU leaves behind: results, counts and plots."""
