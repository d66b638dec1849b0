"""Launches, launch plans, allocation, chunks of a batch, loads."""
