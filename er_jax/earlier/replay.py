"""The earlier name of `tools.replay`, `tools.deciders` and `tools.traces`."""

from er_jax.tools.deciders import *  # noqa: F403
from er_jax.tools.replay import *  # noqa: F403
from er_jax.tools.traces import *  # noqa: F403
