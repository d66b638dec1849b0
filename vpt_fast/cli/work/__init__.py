"""What the commands do: imported when one runs, as PyTorch and timm take seconds to import."""
