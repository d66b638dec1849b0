"""The launches of a problem on tensors without memory, one module per operation."""
