"""timm's VisionTransformer."""
