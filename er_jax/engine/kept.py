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

# Calls whose engines are kept; those that one call needs together count as one, however
# many they are.
MAX_ENGINES = 16

_kept: list[dict[Hashable, Engine]] = []
"""By name, together what one call needs; the least recently used first."""

_living: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
"""All that somebody still holds: kept ones, and those of calls that have not ended."""

_lock = threading.Lock()


def engine_for(policy: Policy, params: Params, accept: AcceptRule) -> Engine:
    """Return the engine of this policy, these parameter shapes and this rule.

    On the default device. Engines are kept, least recently used first out, so that
    calls of `rollout` share programs without the caller holding anything.
    """
    name = (policy, signature(params), accept, default_device())
    return kept_engines({name: lambda: Engine(policy, accept)})[0]


def kept_engines(wanted: Mapping[Hashable, Callable[[], Kind]]) -> list[Kind]:
    """Return the engines that one call needs; they are kept and dropped together.

    Args:
      wanted: name -> what makes that engine, if it is not there.
    """
    with _lock:
        own: dict[Hashable, Any] = {
            name: _living.get(name) or make() for name, make in wanted.items()
        }
        _living.update(own)
        latest = next((calls for calls in _kept if own.keys() <= calls.keys()), None)
        if latest is None:
            latest = own
            for calls in _kept:
                for name in own.keys() & calls.keys():
                    del calls[name]
        _kept[:] = [calls for calls in _kept if calls and calls is not latest]
        _kept.append(latest)
        del _kept[:-MAX_ENGINES]
        return list(own.values())  # in the order of `wanted`


def forget_engines() -> None:
    """Drop all kept engines with their programs and controllers.

    For processes that go through many models or shapes: on CPU some hundred compiled
    programs use up the memory mappings that Linux allows a process. A call that another
    thread is in goes on with its own, which ends with it.
    """
    with _lock:
        _kept.clear()
        _living.clear()
