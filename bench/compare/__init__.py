"""Providers side by side: checked, timed in interleaved rounds, collected."""
