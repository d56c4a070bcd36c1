"""Sessions: what calls of `rollout` share, held and freed by the caller.

Calls without a session share engines for as long as the process lives. A session has
engines of its own, with their compiled programs and controllers.

Left out: what a call does with them (`call`).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from er_jax.control.protocol import ControllerProtocol
from er_jax.engine.kept import KeptEngines


class Session:
    """What calls of `rollout` and `stream` share, freed when the session is closed.

    Give it as `session` to any number of calls, of any policies, in any threads: they
    share compiled programs and controllers with each other and with no other call. New
    parameters of the same shapes use the same programs. The tokens are those of a call
    without a session.

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
      >>> [len(out.stats.compiled) > 0 for out in outs]
      [True, False]
    """

    def __init__(self) -> None:
        self.engines = KeptEngines()
        self._controller: ControllerProtocol | None = None
        self._is_closed = False

    def __enter__(self) -> Session:
        """Return the session."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()

    def close(self) -> None:
        """Free all that it holds; what a call in another thread uses, when that ends.

        Calls that begin later are refused. Closing again does nothing.
        """
        self._is_closed = True
        self.engines.forget()
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
        """Return what it holds as text for people: engines and programs."""
        engines = self.engines.all()
        programs = [one for engine in engines for one in engine.compiled.values()]
        seconds = sum(program.compile_s for program in programs)
        lines = ["closed"] if self.is_closed else []
        lines.append(
            f"engines: {len(engines)}, with {len(programs)} programs compiled in "
            f"{seconds:.1f} s"
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
