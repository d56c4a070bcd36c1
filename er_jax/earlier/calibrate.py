"""The earlier name of `costs.timing`, `costs.store` and `tools.survey`."""

from er_jax.costs.store import *  # noqa: F403
from er_jax.costs.timing import *  # noqa: F403
from er_jax.tools.survey import *  # noqa: F403
