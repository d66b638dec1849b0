"""Pages and pictures about runs, prompts and memory."""
