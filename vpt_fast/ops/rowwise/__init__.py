"""Row-wise operations: residual sums with LayerNorm, activations, grouped classifiers."""
