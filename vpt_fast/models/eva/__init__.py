"""timm's Eva: DINOv3, EVA02, Perception Encoder and other models with rotary embedding."""
