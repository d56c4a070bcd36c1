"""One file per run: the values, and why they are what they are."""
