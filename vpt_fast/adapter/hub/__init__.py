"""The Hugging Face Hub: model cards, adapters by their name there, and pushing them."""
