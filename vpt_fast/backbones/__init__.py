"""The pretrained models that are tuned."""
