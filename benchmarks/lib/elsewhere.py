"""A device elsewhere, imitated: its rounds take a fixed time and leave the host free.

As behind an accelerator, the host's cores are idle while a window runs, so that what it
does meanwhile is measured apart from what it takes from a decoder on the same cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from er_jax.engine.engine import RunningWindow


@contextlib.contextmanager
def rounds_of(seconds: float) -> Iterator[None]:
    """Let every round of a window take so long; tokens and programs are as they were.

    Args:
      seconds: more than a round of the decoder takes here.
    """
    wait = RunningWindow.wait

    def waiting(window: RunningWindow) -> tuple[Any, float, bool]:
        info, _, _ = wait(window)
        window_s = int(info.num_rounds) * seconds
        time.sleep(max(window._start_s + window_s - time.perf_counter(), 0.0))
        return info, window_s, True

    RunningWindow.wait = waiting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RunningWindow.wait = wait  # type: ignore[method-assign]
