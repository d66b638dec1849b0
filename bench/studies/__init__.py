"""Studies of single questions."""
