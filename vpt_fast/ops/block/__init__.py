"""A frozen block, and several in a row, as one autograd function."""
