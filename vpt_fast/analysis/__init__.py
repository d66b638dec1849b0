"""Attention to prompts, token mixing maps, and bytes that training saves for backward."""

from vpt_fast.analysis.activation_memory import MeasuredPeaks, SavedBytes
from vpt_fast.analysis.shares import PromptAttention, attention_shares, mixing_maps, uniform_share

__all__ = [
    "MeasuredPeaks",
    "PromptAttention",
    "SavedBytes",
    "attention_shares",
    "mixing_maps",
    "uniform_share",
]
