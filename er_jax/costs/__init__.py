"""Costs of rounds: `table` of whole rounds, `passes` and `roofline` of single passes,
`timing` on this device, `record` and `store` on disk.
"""

from er_jax.costs.passes import PassCosts, Reading
from er_jax.costs.roofline import Roofline
from er_jax.costs.table import LatencyTable

__all__ = ["LatencyTable", "PassCosts", "Reading", "Roofline"]
