"""The loop over windows: all decisions of a rollout.

It decides with host integers only, and reads from the device once per window.

* Refill: free slots take the next sequences while there are any.
* Shape: the controller picks rows, cache length and gamma among the programs that can
  run now. Rows shrink only when no sequence waits.
* A window ends where one of these could change. While it runs, the completions of the
  window before are delivered.
* A turn of a conversation that has ended is answered by another thread. What has been
  answered goes back into the queue between windows; while all sequences wait for
  answers, the loop does.

Left out: time, acceptance, compile costs (`control`); sizes of requests (`request`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from er_jax.control.protocol import ControllerProtocol
from er_jax.journal import Journal
from er_jax.request import Request
from er_jax.respond import Respond
from er_jax.result import Completion, keeping
from er_jax.scheduler.batch import Batch
from er_jax.scheduler.conversations import Conversations
from er_jax.scheduler.monitor import Monitor
from er_jax.scheduler.prompts import Reuse
from er_jax.scheduler.topology import Topology
from er_jax.scheduler.turns import Turns
from er_jax.stats import RolloutStats
from er_jax.types import Sampling
from er_jax.until import Until


def run(
    topology: Topology,
    request: Request,
    settings: Sampling,
    controller: ControllerProtocol,
    stats: RolloutStats,
    *,
    begun: Mapping[int, Completion] = MappingProxyType({}),
    journal: Journal | None = None,
    respond: Respond | None = None,
    turned: Mapping[int, str] = MappingProxyType({}),
    reuse: Reuse | None = None,
    until: Until | None = None,
    began_s: float = 0.0,
    on_finish: Callable[[int, Completion], None] | None = None,
    progress: bool = False,
) -> dict[int, Completion]:
    """Sample the waiting sequences of the request and return their completions.

    Of several processes on one mesh, each returns the completions whose rows were last
    on its devices. All processes decide alike, because they share the state and use the
    measurements of one of them (`engine.protocol.Agreement`).

    Args:
      topology: engine and parameters, and the layouts of a batch on the devices.
      request: the sequences. settings: traced sampling settings.
      controller: chooses programs and learns from windows.
      stats: filled in. begun: completions that go on, by sequence.
      journal: is told of what has been sampled, now and then of rows that run.
      respond: answers turns, so that a completion is a conversation; of several
        processes the leader asks.
      turned: why turns of `begun` have ended, by sequence, of those not answered yet.
      reuse: the prompts kept from call to call; None prefills all.
      until: when to end early; then the completions of rows that run or wait are
        "unfinished".
      began_s: `time.perf_counter()` when the call began, for `until.seconds`.
      on_finish: called with (sequence id, completion) as rows end.
      progress: show a progress bar of finished sequences; see `Monitor`.
    Returns:
      Sequence (0 .. N-1) -> completion.
    Raises:
      RolloutError: anything failed; it carries the finished completions.
      KeyboardInterrupt: its attribute `completions` holds them as well; see `keeping`.
    """
    agreement = topology.engine.agreement
    arguments = (topology, request, stats, settings, begun, journal, reuse)
    if respond is None:
        batch = Batch(*arguments)
    else:
        turns = Turns(respond, topology.engine.policy.vocab_size, stats, agreement)
        batch = Conversations(turns, turned, *arguments)

    def deliver(
        finished: list[int], failure: Exception | None = None
    ) -> Exception | None:
        if failure is not None:
            return failure  # It came before.
        for sequence in finished:
            monitor.finish(len(batch.completions[sequence].token_ids))
            if on_finish is None:
                continue
            try:
                sequence_id = int(request.sequence_ids[sequence])
                # A copy, so that the callback cannot change the result.
                on_finish(sequence_id, batch.completions[sequence].copy())
            except Exception as error:
                return error
        return None

    def at_once(failure: Exception | None) -> Exception | None:
        # Other processes would wait for this one where they meet next; there they are
        # told.
        if failure is not None and not agreement.is_spread:
            raise failure
        return failure

    def finished() -> dict[int, Completion]:
        # One window may be over and not yet collected, and another may be running. If
        # the device itself has failed, nothing more can be fetched.
        batch.close()
        with contextlib.suppress(Exception):
            batch.collect()
        with contextlib.suppress(Exception):
            batch.end_window(controller)
        with contextlib.suppress(Exception):
            batch.collect()
        return batch.completions

    with (
        contextlib.closing(batch),
        Monitor(len(request.waiting), progress, stats) as monitor,
        keeping(finished, request, batch.unfinished),
    ):
        failure = at_once(deliver(batch.ask_again()))
        while batch.is_going_on:
            if not (batch.queue or batch.num_live):
                # All wait for answers, or will when the last window is collected.
                failure = at_once(deliver(batch.collect(), failure))
                answered = batch.wait_for_answers(failure)
                failure = at_once(deliver(answered, failure))
                if until is not None and batch.is_reached(until, began_s):
                    break
                continue
            if batch.is_refill_due():
                batch.refill()
            program = batch.program
            if program is None or batch.is_decision_due():
                batch.look(controller)
                program = controller.choose(
                    batch.options(controller.gammas),
                    batch.program,
                    compile_s=batch.compile_s,
                    live=batch.num_live,
                    length=batch.rows.mean_length,
                )
                batch.move_to(program)
            with jax.profiler.StepTraceAnnotation("window", **program._asdict()):
                batch.start_window(program, controller.table.round_seconds(program))
                # While this window runs, completions of the one before are delivered.
                failure = deliver(batch.collect(), failure)
                monitor.show(program, batch.rows, request, len(batch.queue))
                batch.end_window(controller, failure)
            failure = None
            if batch.num_open and (until is not None or agreement.is_spread):
                # Which of the rows that ended go on. Several processes tell each other,
                # and would wait for a window that runs.
                failure = at_once(deliver(batch.collect()))
            failure = at_once(deliver(batch.take_answers(failure), failure))
            if until is not None and batch.is_reached(until, began_s):
                break
        batch.close()
        failure = deliver(batch.collect(), failure)
        _, failure = agreement.sync_or_raise([], failure)
        if failure is not None:
            raise failure
        return batch.completions | batch.unfinished()
