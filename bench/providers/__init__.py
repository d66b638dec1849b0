"""Who is compared: the same work in several implementations."""
