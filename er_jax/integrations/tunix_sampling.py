"""Rollouts that answer the calls of several threads, with weights that are replaced.

`tunix` hands its calls to a `CallSampler`. Nothing here imports Tunix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from er_jax import checks
from er_jax.control.controller import Controller
from er_jax.drafter import PolicyParams
from er_jax.integrations.batching import Batcher
from er_jax.integrations.tunix_calls import (
    GenerateCall,
    Noise,
    batch_of,
    rollouts_of,
    shared_limit,
)
from er_jax.result import Completion, Rollout
from er_jax.rollout import rollout
from er_jax.types import Policy


class CallSampler:
    """Samples for calls of several threads at once.

    Args:
      policy: the model.
      controller: decides when to draft.
      seed: of the noise of calls without a key; see `Noise`.
      max_wait_s: seconds that a call waits for others; see `Batcher`.
      usual_limit: tokens of a completion that most calls ask for; see `shared_limit`.
      mesh: of the rollouts; None is `device` alone.
      on_rollout: called with every rollout.
    """

    def __init__(
        self,
        policy: Policy,
        controller: Controller,
        *,
        seed: int,
        max_wait_s: float,
        usual_limit: int,
        device: jax.Device,
        mesh: Mesh | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> None:
        self._policy, self._controller, self._mesh = policy, controller, mesh
        self._device, self._on_rollout = device, on_rollout
        self._usual_limit = usual_limit
        self._noise = Noise(seed)
        self._batcher = Batcher(batch_of, self._run, max_wait_s)
        self._lock = threading.Lock()
        self._params: PolicyParams | None = None

    @property
    def params(self) -> PolicyParams:
        """The weights that the next rollout samples from, with their draft."""
        if self._params is None:
            raise RuntimeError(
                "the last update of the weights failed; update them again"
            )
        return self._params

    def update(self, make: Callable[[], PolicyParams]) -> None:
        """Replace the weights by what `make` returns; later calls have other noise.

        The old ones make room first, unless a rollout still uses them: it goes on with
        the weights that it began with.
        """
        with self._lock:
            self._params = None
            self._params = make()
            self._noise.advance()

    def placement(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which programs without a mesh run on their device."""
        if self._mesh is not None:
            return contextlib.nullcontext()
        return jax.default_device(self._device)

    def sample(self, call: GenerateCall) -> list[Completion]:
        """Return the completions of a call; threads may call at once.

        Raises:
          ValueError: token ids that are none.
          RolloutError: the rollout failed.
        """
        # Here, where it fails this call alone and not those that it is run with.
        checks.checked_prompts(call.prompts, self._policy.vocab_size)
        self._batcher.submit(call)
        return [completion for completion in call.completions if completion is not None]

    def _run(self, calls: list[GenerateCall]) -> None:
        """Answer calls that `batch_of` has put together."""
        places = [(call, i) for call in calls for i in range(len(call.prompts))]
        prompts = [call.prompts[i] for call, i in places]
        first = calls[0]
        with self._lock:
            params = self.params
            if first.key is None:
                limit = shared_limit(calls, self._usual_limit)
                key, ids = self._noise.key, self._noise.ask(prompts)
            else:
                limit = first.settings.max_new_tokens
                key, ids = first.key, list(range(len(prompts)))
        for indices in rollouts_of(ids):
            place_of = {ids[i]: places[i] for i in indices}

            def deliver(name: int, found: Completion, place_of: Any = place_of) -> None:
                call, index = place_of[name]
                if call.put(index, found):
                    self._batcher.finish(call)

            with self.placement():
                out = rollout(
                    self._policy,
                    params,
                    [prompts[i] for i in indices],
                    key=key,
                    config=dataclasses.replace(first.settings, max_new_tokens=limit),
                    sequence_ids=[ids[i] for i in indices],
                    controller=self._controller,
                    mesh=self._mesh,
                    on_finish=deliver,
                )
            # Of several processes, each is told of some completions and has them all.
            for row, name in enumerate(out.sequence_ids):
                deliver(int(name), _completion(out, row))
            if self._on_rollout is not None:
                self._on_rollout(out)


def _completion(out: Rollout, row: int) -> Completion:
    length = int(out.lengths[row])
    return Completion(
        token_ids=out.completion_ids[row, :length],
        logprobs=out.logprobs[row, :length],
        finish_reason=str(out.finish_reason[row]),
    )
