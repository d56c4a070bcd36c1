"""The earlier name of `er_jax.io.hf_weights` and `er_jax.io.hf_save`."""

from er_jax.io.hf_save import *  # noqa: F403
from er_jax.io.hf_weights import *  # noqa: F403
