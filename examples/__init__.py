"""Programs that use the package as others would; none of them is installed with it."""
