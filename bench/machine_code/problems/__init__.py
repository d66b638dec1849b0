"""The launches of a problem, for tensors without memory."""
