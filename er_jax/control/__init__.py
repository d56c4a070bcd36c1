"""Which program next: draft length, batch size and cache length by measured speed.

`protocol` says what a controller offers, `estimate` how likely drafts are used,
`controller` chooses, `paper` is the published rule.
"""

from er_jax.config import DEFAULT_GAMMAS, parse_control
from er_jax.control.controller import Controller
from er_jax.control.estimate import PRIOR_KEEP, AcceptanceEstimate
from er_jax.control.paper import PaperRule

__all__ = [
    "AcceptanceEstimate",
    "Controller",
    "DEFAULT_GAMMAS",
    "PRIOR_KEEP",
    "PaperRule",
    "parse_control",
]
