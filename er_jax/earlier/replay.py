"""The earlier name of `er_jax.tools.replay` and `er_jax.tools.traces`."""

from er_jax.tools.replay import *  # noqa: F403
from er_jax.tools.traces import *  # noqa: F403
