"""The host side of a rollout: `loop` on one screen, the `batch`, who starts where
(`admission`), which programs may run (`options`), and the devices below (`topology`).
"""

from er_jax.request import Request
from er_jax.result import Completion, RolloutError
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.loop import run

__all__ = ["Batch", "Completion", "Request", "RolloutError", "run"]
