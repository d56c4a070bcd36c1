"""Checkpoints and text: Hugging Face configurations, weights and tokenizers."""
