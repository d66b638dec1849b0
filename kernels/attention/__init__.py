"""Attention with prompts beside the tokens: softmax(q [K_p; K]^T * scale) [V_p; V]."""
