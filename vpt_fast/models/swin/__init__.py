"""timm's SwinTransformer."""
