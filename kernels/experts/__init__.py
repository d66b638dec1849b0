"""VAPT's prompt experts: folding, token mixing, feature projector."""
