"""What was trained, on disk."""
