"""What the library can say without a training run: the command `er-jax`."""
