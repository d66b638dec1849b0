"""A tuned model as a plain module for inference."""
