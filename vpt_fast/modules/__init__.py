"""nn.Modules that own what is trained, and what is asked of any module."""
