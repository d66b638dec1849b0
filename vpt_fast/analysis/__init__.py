"""What prompts do, and what training saves for backward."""
