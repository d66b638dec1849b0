"""Providers compared: checked, timed in interleaved rounds, collected into tables and plots."""
