"""The earlier name of `er_jax.io.text`."""

from er_jax.io.text import *  # noqa: F403
