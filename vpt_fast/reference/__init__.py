"""The published formulation: prompts concatenated, in eager PyTorch."""
