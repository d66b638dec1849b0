"""timm's models, tuned: a folder per family, and what the families share."""
