"""Compiled programs, and running them; only here and in `mesh` is anything jitted.

`protocol` says what an engine offers, `windows` has the jitted functions, `scores` that
of scoring, `programs` the executables, `engine` the engine of one device, `kept` the
engines between calls.
"""

from er_jax.engine.engine import Engine
from er_jax.engine.kept import engine_for, forget_engines
from er_jax.engine.windows import refresh_draft, run_window

__all__ = ["Engine", "engine_for", "forget_engines", "refresh_draft", "run_window"]
