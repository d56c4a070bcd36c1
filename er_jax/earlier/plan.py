"""The earlier name of `tools.plan`, `tools.presets` and `tools.hlo`."""

from er_jax.tools.hlo import *  # noqa: F403
from er_jax.tools.plan import *  # noqa: F403
from er_jax.tools.presets import *  # noqa: F403
