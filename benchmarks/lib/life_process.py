"""What a process does that lives one life of a rollout, and what it leaves behind.

It makes the call of a workload in its own way, and gets its signal at the moment that
is chosen, or from outside. Everything that it is told it writes down at once, where a
kill leaves it.

A process leaves in its folder: `told`, a line of JSON for all that it was told; and, if
the call gave anything, `out.npz` and `ended`, JSON. `problem` is there if it failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import er_jax
from benchmarks.lib import agreement, stored_programs
from benchmarks.lib.chains import (
    ANY,
    AT_LIMIT,
    CTRL_C,
    KILL,
    TERM,
    TERM_STOP,
    UNTIL,
    VOCAB_SIZE,
    Interrupt,
    Life,
    Workload,
)
from benchmarks.lib.controllers import Restless
from benchmarks.lib.moments import Moments
from er_jax import Rollout, journal
from er_jax.scheduler import batch
from er_jax.scheduler.options import Options
from er_jax.types import Params

SIGNALS = {CTRL_C: signal.SIGINT, TERM: signal.SIGTERM, TERM_STOP: signal.SIGTERM}
SIGNALS[KILL] = signal.SIGKILL

NUM_DEVICES = 8
HEAD = 2

SLOTS = 4
"""Of rollouts that nothing disturbs."""

TOLD, OUT, ENDED, PROBLEM = "told", "out.npz", "ended", "problem"


def policy_of(dtype: str) -> er_jax.Decoder:
    """Return the policy of all chains, of one layer."""
    return er_jax.Decoder(
        er_jax.DecoderConfig(
            vocab_size=VOCAB_SIZE, dim=16, num_layers=1, num_heads=4, num_kv_heads=2,
            hidden_dim=32, dtype=dtype,
        )
    )  # fmt: skip


def _params(dtype: str, store: Path) -> Params:
    """Return its parameters, made once and read from then on."""
    path = store / dtype
    if not path.exists():
        params = policy_of(dtype).init(jax.random.key(0))
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(jax.tree.map(np.asarray, params)))
        part.replace(path)
    return jax.tree.map(jax.numpy.asarray, pickle.loads(path.read_bytes()))


def key_of(workload: Workload) -> jax.Array:
    """Return the key of a workload; made of words, which compiles nothing."""
    words = jax.numpy.asarray(np.array([0, workload.seed % 2**31], np.uint32))
    return jax.random.wrap_key_data(words)


@contextlib.contextmanager
def _process(
    folder: Path, store: Path, dtype: str, mesh: object = None
) -> Iterator[None]:
    """Run a block as all there is of this process, which ends with it."""
    try:
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
        jax.config.update("jax_enable_x64", dtype == "float64")
        # Most of the first runs is compilation.
        jax.config.update("jax_disable_most_optimizations", True)
        stored_programs.use(store, f"{dtype} {mesh}")
        # The usual one is a semaphore of the system, which a kill would leave behind.
        tqdm.set_lock(threading.RLock())
        warnings.filterwarnings("ignore", "drafts were kept", RuntimeWarning)
        yield
    except BaseException:
        (folder / PROBLEM).write_text(traceback.format_exc())
    os._exit(0)


def undisturbed(folder: Path, store: Path, workloads: Sequence[Workload]) -> None:
    """Sample workloads of one dtype whole, on one device; files `SEED.npz`.

    Args:
      folder: of the files. store: of programs.
    """
    dtype = workloads[0].dtype
    with _process(folder, store, dtype):
        params = _params(dtype, store)
        for workload in workloads:
            moments = Moments(None, lambda: None)
            config = er_jax.RolloutConfig(
                max_new_tokens=workload.max_new_tokens,
                n=workload.n,
                max_slots=SLOTS,
                stop_token_ids=workload.stops,
                control="ar",
            )
            out = er_jax.rollout(
                policy_of(dtype),
                params,
                workload.prompts,
                key=key_of(workload),
                config=config,
                respond=_respond(workload, moments, lambda **_: None),
            )
            out.save(folder / f"{workload.seed}.npz")


def _respond(workload: Workload, moments: Moments, tell: Any) -> er_jax.Respond | None:
    if not workload.is_answered:
        return None
    own = moments.answering(workload, tell)

    def respond(sequence_id: int, turn: er_jax.Turn) -> Any:
        time.sleep(workload.tool_s)
        return own(sequence_id, turn)

    return er_jax.Respond(
        respond,
        max_turns=workload.max_turns,
        max_turn_tokens=workload.turn_tokens,
    )


def live(
    folder: Path,
    store: Path,
    workload: Workload,
    life: Life,
    resume: Path | None,
    journal_path: Path,
    begun: Connection,
) -> None:
    """Live a life; see the module.

    Args:
      folder: what it leaves. store: of programs. resume, journal_path: of the call.
      begun: is told when the batch is about to start.
    """
    with (
        _process(folder, store, workload.dtype, life.way.mesh),
        (folder / TOLD).open("ab", buffering=0) as file,
    ):

        def tell(**what: Any) -> None:
            file.write(json.dumps(what).encode() + b"\n")

        stop = er_jax.Stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupt = life.interrupt
        if interrupt is not None and interrupt.kind == TERM_STOP:
            signal.signal(signal.SIGTERM, lambda *_: stop())

        def act() -> None:
            assert interrupt is not None
            tell(interrupt=interrupt.kind)
            if interrupt.kind == UNTIL:
                stop()
            else:
                os.kill(os.getpid(), SIGNALS[interrupt.kind])

        moments = Moments(interrupt, act)
        call = _arguments(workload, life, store)
        moments.place()
        batch.WINDOW_S, batch.MIN_ROUNDS = 0.0, life.rounds
        journal.EVERY_S = life.every_s
        # No program is waited for, so none is worse than another for being new.
        Options.is_compiled = lambda *_: True  # type: ignore[method-assign]

        def on_finish(sequence_id: int, completion: er_jax.Completion) -> None:
            tell(finished=sequence_id, tokens=completion.token_ids.tolist())

        begun.send("begun")
        how, out = "returned", None
        try:
            out = er_jax.rollout(
                **call,
                on_finish=moments.finishing(on_finish),
                resume=resume,
                until=_until(interrupt, stop),
                version=life.number,
                journal=journal_path,
                respond=_respond(workload, moments, tell),
            )
        except KeyboardInterrupt as error:
            how = "interrupted"
            out = getattr(error, "rollout", None)
            if out is None and moments.has_begun:
                raise
        _leave(folder, out, how)


def _arguments(workload: Workload, life: Life, store: Path) -> dict[str, Any]:
    way, mesh = life.way, None
    if way.mesh is not None:
        devices = np.array(jax.devices())[: way.mesh[0] * way.mesh[1]]
        mesh = jax.sharding.Mesh(devices.reshape(way.mesh), ("data", "model"))
    config = er_jax.RolloutConfig(
        max_new_tokens=workload.max_new_tokens,
        n=workload.n,
        max_slots=way.slots,
        stop_token_ids=workload.stops,
        control=way.control,
        gammas=way.gammas,
        drafter=er_jax.DrafterConfig(window=way.window, head=HEAD),
    )
    return {
        "policy": policy_of(workload.dtype),
        "params": _params(workload.dtype, store),
        "prompts": workload.prompts,
        "key": key_of(workload),
        "config": config,
        "mesh": mesh,
        "controller": Restless(way.control, way.gammas, way.rows, life.seed),
    }


def _until(interrupt: Interrupt | None, stop: er_jax.Stop) -> er_jax.Until:
    limits: dict[str, Any] = {}
    if interrupt is not None and interrupt.moment == AT_LIMIT:
        assert interrupt.limit is not None
        limits = dict([interrupt.limit])
    elif interrupt is not None and (interrupt.kind, interrupt.moment) == (UNTIL, ANY):
        limits = {"seconds": interrupt.delay_s}
    return er_jax.Until(stop=stop, **limits)


def _leave(folder: Path, out: Rollout | None, how: str) -> None:
    if out is None:
        return
    out.save(folder / OUT)
    stats = out.stats
    ended = {
        "how": how,
        "sampled": stats.num_tokens,
        "resumed": stats.num_resumed,
        "journalled": stats.num_journalled,
        "drafts kept": sum(
            int(np.arange(gamma + 1) @ kept) for gamma, kept in stats.accepted.items()
        ),
        "shapes": len({program.shape for program in stats.programs}),
    }
    (folder / ENDED).write_text(json.dumps(ended))


def prove(folder: Path, store: Path, workload: Workload, found: Path) -> None:
    """Compare a rollout with the undisturbed one, up to ties; file `proof`, JSON.

    Args:
      folder: of the undisturbed one. store: of programs. found: file of the other.
    """
    with _process(found.parent, store, workload.dtype):
        outs = [Rollout.load(folder / f"{workload.seed}.npz"), Rollout.load(found)]
        expected, own = map(agreement.completions_of, outs)
        result = agreement.compare(
            policy_of(workload.dtype),
            _params(workload.dtype, store),
            [prompt for prompt in workload.prompts for _ in range(workload.n)],
            expected,
            own,
            agreement.sampling_settings(key_of(workload), workload.stops),
            agreement.TIE_GAP[workload.dtype],
        )
        proof = {"ties": result.num_ties, "unexplained": result.unexplained}
        (found.parent / "proof").write_text(json.dumps(proof))
