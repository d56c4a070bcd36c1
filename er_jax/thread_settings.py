"""JAX's settings of one thread, for another thread that works on its behalf.

A setting that a thread has changed for a while, as by `with jax.enable_x64(True):`, is
not that of a thread it starts, which would sample other tokens or compile other
programs. Left out: the deprecated `with mesh:`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class ThreadSettings:
    """The settings of a thread: JAX's, the mesh of `jax.set_mesh`, context variables.

    Attributes:
      values: of every option of JAX, by name.
      mesh: from `jax.set_mesh`; an empty one if there is none.
      context: of Python's context variables.
    """

    values: Mapping[str, Any]
    mesh: Any
    context: contextvars.Context

    @classmethod
    def here(cls) -> ThreadSettings:
        """Return the settings of the calling thread."""
        return cls(
            values=dict(jax.config.values),
            mesh=jax.sharding.get_mesh(),
            context=contextvars.copy_context(),
        )

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in this thread, under these settings."""

        def run() -> Result:
            with contextlib.ExitStack() as stack:
                for name, value in self.values.items():
                    # `jax.enable_x64` changes the option "jax_enable_x64" for a thread,
                    # and so on: an option without such a function is the same in all.
                    change: Any = getattr(jax, name.removeprefix("jax_"), None)
                    if change is not None and jax.config.values[name] != value:
                        stack.enter_context(change(value))
                if not self.mesh.empty:
                    stack.enter_context(jax.set_mesh(self.mesh))
                return function(*args)

        # A copy, because two threads cannot be in one context.
        return self.context.copy().run(run)
