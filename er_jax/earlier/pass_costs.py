"""The earlier name of `costs.passes`, `costs.roofline` and `costs.record`."""

from er_jax.costs.passes import *  # noqa: F403
from er_jax.costs.record import *  # noqa: F403
from er_jax.costs.roofline import *  # noqa: F403
