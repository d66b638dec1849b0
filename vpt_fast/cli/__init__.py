"""`vpt-fast`."""
