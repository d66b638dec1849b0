"""Export of a tuned model as a plain module for inference."""

from vpt_fast.export.baking import bake

__all__ = ["bake"]
