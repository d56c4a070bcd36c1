"""The earlier name of `io.hf_config` and `io.json_fields`."""

from er_jax.io.hf_config import *  # noqa: F403
from er_jax.io.json_fields import *  # noqa: F403
