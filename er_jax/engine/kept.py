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

_kept: list[dict[Hashable, Engine]] = []
"""The engines of each call by name; the least recently used call first."""

_living: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
"""All engines still in use: the kept ones, and those of running calls."""

_lock = threading.Lock()


def engine_for(
    policy: Policy, params: Params, accept: AcceptRule, attention: str = "auto"
) -> Engine:
    """Return the engine of a policy, parameter shapes, acceptance rule and attention.

    It runs on the default device. Engines are kept (the least recently used is dropped
    first), so that calls of `rollout` share programs and the caller holds nothing.
    """
    name = (policy, signature(params), accept, attention, default_device())
    return kept_engines({name: lambda: Engine(policy, accept, attention)})[0]


def kept_engines(wanted: Mapping[Hashable, Callable[[], Kind]]) -> list[Kind]:
    """Return the engines of one call; they are kept and dropped together.

    Args:
      wanted: name -> function that makes the engine if it does not exist.
    """
    with _lock:
        engines: dict[Hashable, Any] = {
            name: _living.get(name) or make() for name, make in wanted.items()
        }
        _living.update(engines)
        latest = next((call for call in _kept if engines.keys() <= call.keys()), None)
        if latest is None:
            latest = engines
            for call in _kept:
                for name in engines.keys() & call.keys():
                    del call[name]
        _kept[:] = [call for call in _kept if call and call is not latest]
        _kept.append(latest)
        del _kept[:-MAX_ENGINES]
        return list(engines.values())  # in the order of `wanted`


def forget_engines() -> None:
    """Drop all kept engines with their programs and controllers.

    For processes that use many models or shapes: on CPU, some hundred compiled programs
    use up the memory mappings that Linux allows a process. Calls that run in other
    threads keep their engines until they end.
    """
    with _lock:
        _kept.clear()
        _living.clear()
