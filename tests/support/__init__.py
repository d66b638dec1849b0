"""Plain references, independent of the library, and what tests share."""
