"""The equations in plain PyTorch, independent of the library, and the models they are tested on."""
