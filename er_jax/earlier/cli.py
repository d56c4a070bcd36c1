"""The earlier name of `er_jax.tools.cli`."""

from er_jax.tools.cli import *  # noqa: F403
