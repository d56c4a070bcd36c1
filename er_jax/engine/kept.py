"""Engines kept between calls, so that calls of `rollout` share programs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from er_jax.acceptance import AcceptRule
from er_jax.devices import default_device
from er_jax.engine.engine import Engine
from er_jax.engine.programs import signature
from er_jax.types import Params, Policy

Kind = TypeVar("Kind", bound=Engine)

# Calls whose engines are kept; the engines of one call count as one.
MAX_ENGINES = 16


class KeptEngines:
    """Engines by name, those of one call together; the least recently used go first.

    Engines of running calls are found as well, though they may be kept no more.
    """

    def __init__(self) -> None:
        # The engines of each call; the least recently used call first.
        self._kept: list[dict[Hashable, Engine]] = []
        # All engines still in use: the kept ones, and those of running calls.
        self._living: weakref.WeakValueDictionary[Hashable, Engine] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def engines(self, wanted: Mapping[Hashable, Callable[[], Kind]]) -> list[Kind]:
        """Return the engines of one call; they are kept and dropped together.

        Args:
          wanted: name -> function that makes the engine if it does not exist.
        """
        with self._lock:
            engines: dict[Hashable, Any] = {
                name: self._living.get(name) or make() for name, make in wanted.items()
            }
            self._living.update(engines)
            kept = self._kept
            holders = (call for call in kept if engines.keys() <= call.keys())
            latest = next(holders, None)
            if latest is None:
                latest = engines
                for call in kept:
                    for name in engines.keys() & call.keys():
                        del call[name]
            kept[:] = [call for call in kept if call and call is not latest]
            kept.append(latest)
            del kept[:-MAX_ENGINES]
            return list(engines.values())  # in the order of `wanted`

    def all(self) -> list[Engine]:
        """Return the kept engines."""
        with self._lock:
            return [engine for call in self._kept for engine in call.values()]

    def forget(self) -> None:
        """Drop all; calls that run keep theirs until they end."""
        with self._lock:
            self._kept.clear()
            self._living.clear()


_kept = KeptEngines()
"""Those of calls without a session, for as long as the process lives."""


def engine_for(
    policy: Policy,
    params: Params,
    accept: AcceptRule,
    attention: str = "auto",
    kept: KeptEngines | None = None,
) -> Engine:
    """Return the engine of a policy, parameter shapes, acceptance rule and attention.

    It runs on the default device. Engines are kept (the least recently used is dropped
    first), so that calls of `rollout` share programs and the caller holds nothing.

    Args:
      kept: where to look and to keep it; None is the process.
    """
    name = (policy, signature(params), accept, attention, default_device())
    return kept_engines({name: lambda: Engine(policy, accept, attention)}, kept)[0]


def kept_engines(
    wanted: Mapping[Hashable, Callable[[], Kind]], kept: KeptEngines | None = None
) -> list[Kind]:
    """Return the engines of one call; they are kept and dropped together.

    Args:
      wanted: name -> function that makes the engine if it does not exist.
      kept: where to look and to keep them; None is the process.
    """
    return (_kept if kept is None else kept).engines(wanted)


def forget_engines() -> None:
    """Drop all engines kept by the process, with their programs and controllers.

    For processes that use many models or shapes: on CPU, some hundred compiled programs
    use up the memory mappings that Linux allows a process. Calls that run in other
    threads keep their engines until they end. A `Session` keeps engines of its own.
    """
    _kept.forget()
