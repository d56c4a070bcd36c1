"""The host side of a rollout: the `loop`, its `batch`, the rows where sequences start
(`admission`), the programs that can run (`options`), and the devices (`topology`).
"""

from er_jax.request import Request
from er_jax.result import Completion, RolloutError
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.loop import run

__all__ = ["Batch", "Completion", "Request", "RolloutError", "run"]
