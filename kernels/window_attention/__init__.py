"""Attention in Swin's shifted windows, with prompts in every window."""
