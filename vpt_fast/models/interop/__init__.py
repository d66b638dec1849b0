"""What tuned models meet outside of this package: wrappers, and tracers of torch.fx."""
