"""Training from a folder of images: data, recipe, loop, runs, sweeps and the demo."""
