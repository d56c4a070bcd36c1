"""The earlier name of `er_jax.io.hf_config`."""

from er_jax.io.hf_config import *  # noqa: F403
