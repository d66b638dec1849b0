"""What tuned transformers of one width share: their blocks, their model, their prompts."""
