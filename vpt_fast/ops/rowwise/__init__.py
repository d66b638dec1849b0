"""What goes over rows once: residual sums with LayerNorm, activations, classifiers."""
