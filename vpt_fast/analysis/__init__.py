"""Attention to prompts, token mixing maps, and bytes that training saves for backward."""

from vpt_fast.analysis.shares import PromptAttention, attention_shares, mixing_maps

__all__ = ["PromptAttention", "attention_shares", "mixing_maps"]
