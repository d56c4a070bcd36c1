"""The earlier name of `er_jax.tools.sweep`."""

from er_jax.tools.sweep import *  # noqa: F403
