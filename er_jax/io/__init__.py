"""Hugging Face checkpoints: configurations, weights and tokenizers."""
