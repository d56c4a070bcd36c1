"""Sessions: what calls of `rollout` share, held and freed by the caller.

Calls without a session share engines for as long as the process lives. A session has
engines of its own, with their compiled programs and controllers, and keeps the cache
entries of prompts.

Left out: what a call does with them (`call`).
"""

from __future__ import annotations

import sys
from typing import Any

from er_jax.arguments import is_whole
from er_jax.control.protocol import ControllerProtocol
from er_jax.engine.kept import KeptEngines
from er_jax.scheduler.prompts import PromptCache


class Session:
    """What calls of `rollout` and `stream` share, freed when the session is closed.

    Give it as `session` to any number of calls, of any policies, in any threads: they
    share compiled programs and controllers with each other and with no other call.
    Cache entries of prompts are kept on the device: a prompt that is known is not
    prefilled again, and of one that begins as a known one only the rest is, where that
    is less work. New parameters of the same shapes use the same programs and drop the
    entries. The tokens are those of a call without a session. On a mesh no prompts are
    kept.

    Args:
      prompt_bytes: limit of the kept entries in bytes; those used longest ago are
        dropped first. 0 keeps none.
    Raises:
      ValueError: `prompt_bytes` is no whole number of at least 0.
    Example:
      >>> import jax, er_jax
      >>> policy = er_jax.Decoder(er_jax.DecoderConfig(
      ...     vocab_size=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=1,
      ...     hidden_dim=64))
      >>> params = policy.init(jax.random.key(0))
      >>> config = er_jax.RolloutConfig(max_new_tokens=4, control="ar")
      >>> with er_jax.Session() as session:
      ...     outs = [
      ...         er_jax.rollout(
      ...             policy, params, [[1, 2, 3]], key=jax.random.key(number),
      ...             config=config, session=session)
      ...         for number in range(2)]
      >>> [(out.stats.num_prefilled, out.stats.num_reused) for out in outs]
      [(1, 0), (0, 1)]
    """

    def __init__(self, *, prompt_bytes: int = 2**30) -> None:
        if not is_whole(prompt_bytes, 0, sys.maxsize):
            raise ValueError(
                f"prompt_bytes={prompt_bytes!r} must be a whole number of bytes of at "
                "least 0; 0 keeps no prompts"
            )
        self.engines = KeptEngines()
        self.prompts = PromptCache(prompt_bytes)
        self._controller: ControllerProtocol | None = None
        self._is_closed = False

    def __enter__(self) -> Session:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self.close()

    def close(self) -> None:
        """Free all that it holds; what a call in another thread uses, when that ends.

        Calls that begin later are refused. Closing again does nothing.
        """
        self._is_closed = True
        self.engines.forget()
        self.prompts.close()
        self._controller = None

    @property
    def controller(self) -> ControllerProtocol | None:
        """The controller of the latest call; None before the first."""
        return self._controller

    def use(self, controller: ControllerProtocol) -> None:
        """Note the controller of a call."""
        self._controller = controller

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def summary(self) -> str:
        """Return what it holds as text for people: programs, and prompts."""
        engines = self.engines.all()
        programs = [one for engine in engines for one in engine.compiled.values()]
        seconds = sum(program.compile_s for program in programs)
        lines = ["closed"] if self.is_closed else []
        lines.append(
            f"engines: {len(engines)}, with {len(programs)} programs compiled in "
            f"{seconds:.1f} s"
        )
        prompts = self.prompts
        lines.append(
            f"prompts: {len(prompts)} kept in {prompts.num_bytes / 1e6:.1f} of "
            f"{prompts.limit_bytes / 1e6:.1f} MB; found {prompts.num_uses} times, with "
            f"{prompts.num_used_tokens} tokens known; dropped {prompts.num_evicted} "
            f"for lack of room, {prompts.num_outdated} of earlier parameters"
        )
        return "\n".join(lines)


def check_session(session: Any) -> None:
    """Refuse what is no session, and one that is closed."""
    if not isinstance(session, Session):
        raise ValueError(f"session={session!r} must be an er_jax.Session()")
    if session.is_closed:
        raise ValueError(
            "session is closed, and what it held is freed; make another "
            "er_jax.Session(), or call inside its with block"
        )
