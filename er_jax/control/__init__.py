"""Which program next: draft length, batch size and cache length by measured speed.

`protocol` says what a controller offers, `estimate` how likely drafts are used,
`controller` chooses programs, `paper` is the published rule, `explain` says in words
what a choice rests on.
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
