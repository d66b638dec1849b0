"""Attention in Swin's shifted windows, with prompts."""
