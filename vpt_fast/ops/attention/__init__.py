"""Attention with prompts beside the tokens."""
