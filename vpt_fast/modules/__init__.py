"""nn.Modules that own what is trained, and tests of any module."""
