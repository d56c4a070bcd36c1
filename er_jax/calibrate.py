"""Measuring what rounds cost here, from the engine's own windows.

*First look.* One autoregressive and one speculative window of the smallest batch are
compiled and timed, when plain decoding has taken so long that it is worth to find out
(`Controller.first_look`). That pair decides whether anything else is worth compiling:
where drafting does not pay with one row, where it is bound by memory most, it pays
nowhere. What rollouts learn is kept on disk, for the next process to begin with.

*Survey.* On purpose, ahead of time: rounds at some cells of a grid of rows and lengths,
next always where it is least certain whether speculation pays, until that and the cost
of other drafts are known or the time is spent (`er-jax calibrate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from er_jax import costs
from er_jax.acceptance import expected_tokens
from er_jax.arguments import check_chance, check_gammas, check_number, check_whole
from er_jax.control import PRIOR_KEEP, Controller
from er_jax.costs import LatencyTable
from er_jax.drafter import PolicyParams
from er_jax.engine import Engine, signature
from er_jax.figures import new_figure
from er_jax.pass_costs import Cell, PassCosts
from er_jax.types import (
    NONE,
    Cache,
    DecodeState,
    LogprobKind,
    Policy,
    Program,
    Sampling,
)

# Seconds of rounds behind one reading, and readings per program; the least is taken,
# because other work on the machine only ever adds time.
READING_S = 0.03
NUM_READINGS = 3

# Seconds that a first rollout may be held up for, compilation not counted.
FIRST_BUDGET_S = 20.0

# Names the directory in which costs are kept between processes; nothing keeps none.
CACHE_VARIABLE = "ER_JAX_CACHE"

# So many files are kept there, those that were used last, and the text of a policy in
# one is cut at so many characters. A file that was not finished after so many seconds
# is of a process that was killed.
MAX_FILES = 128
MAX_DESCRIPTION = 1000
ABANDONED_S = 3600.0
OUR_FILES = re.compile(r"costs-[0-9a-f]{16}\.json(\.[\w.-]+\.part)?")


def neutral_sampling(num_stop_ids: int = 8) -> Sampling:
    """Return settings that never stop or cut anything: plain sampling, key 0.

    Their number of stop ids names programs; all of them are unused.
    """
    return Sampling(
        key=np.zeros(2, np.uint32),
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        stop_ids=np.full(num_stop_ids, NONE, np.int32),
        logprob_kind=np.int32(LogprobKind.TEMPERATURE),
    )


def measure_round(
    engine: Engine,
    params: PolicyParams,
    program: Program,
    settings: Sampling | None = None,
    *,
    budget_s: float = math.inf,
) -> float:
    """Time one program on a batch of junk and return seconds per round.

    Args:
      engine, params: what to time. program: rows, cache length, gamma; compiled if it
        is not yet, which is not counted.
      settings: traced sampling settings; None is `neutral_sampling`.
      budget_s: no reading is begun after so many seconds, but for the first.
    """
    if settings is None:
        settings = neutral_sampling()
    state = engine.allocate(program.rows, program.cache_length)
    reach = engine.rounds_per_test * (program.gamma + 1)
    # No further than the policy has positions, whatever the cache has room for.
    most = getattr(engine.policy, "max_length", None) or program.cache_length
    limit = min(program.cache_length, most)
    room = max(limit - 1 - reach, reach) // (program.gamma + 1)

    def run(state: DecodeState, num_rounds: int) -> tuple[DecodeState, float, float]:
        rows = program.rows
        state = dataclasses.replace(
            state,
            length=np.ones(rows, np.int32),
            prompt_length=np.ones(rows, np.int32),
            limit=np.full(rows, limit, np.int32),
            sequence_id=np.arange(rows, dtype=np.int32),
            live=np.ones(rows, bool),
        )
        state, window = engine.start_window(
            params, state, settings, program.gamma, exit_live=0, max_rounds=num_rounds
        )
        info, seconds, _ = window.wait()
        (seconds,) = engine.agree([seconds]).tolist()
        return state, seconds, seconds / max(int(info.num_rounds), 1)

    # The first run touches memory for the first time: it only says how long to read.
    state, spent_s, round_s = run(state, 1)
    readings: list[float] = []
    while not readings or (len(readings) < NUM_READINGS and spent_s < budget_s):
        num_rounds = min(max(int(READING_S / round_s), 1), room)
        state, seconds, round_s = run(state, num_rounds)
        readings.append(round_s)
        spent_s += seconds
    jax.block_until_ready(state.length)
    return min(readings)


def conditions(engine: Engine, params: PolicyParams) -> dict[str, str]:
    """Return what measured costs hold for: device, versions, policy, draft."""
    # Not above: the package imports this module before it knows its version.
    from er_jax import __version__

    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "device": kind,
        "jax": jax.__version__,
        "er_jax": __version__,
        "policy": _described(engine.policy),
        "accept": engine.accept,
        "mesh": "none" if engine.mesh is None else str(dict(engine.mesh.shape)),
        "parameters": _digest(signature(params.policy)),
        "draft": _digest(signature(params.draft)),
        "cache": _digest(signature(_position(engine.policy))),
    }


def _position(policy: Policy) -> Cache:
    """Return the shapes of a policy's cache, for one position of one row."""
    return jax.eval_shape(lambda: policy.init_cache(1, 1))


def _described(policy: Policy) -> str:
    """Return what a policy is, the same in every process; of a long text the start."""
    kind = type(policy)
    text = f"{kind.__module__}.{kind.__qualname__}: {_text(policy)}"
    if len(text) <= MAX_DESCRIPTION:
        return text
    return f"{text[:MAX_DESCRIPTION]}... and more, {_digest(text)}"


def _text(value: Any) -> str:
    """Return a value's text without addresses, which are others in every process."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at an address", repr(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:16]


def cache_directory() -> Path | None:
    """Return where costs are kept between processes.

    In the directory named by `ER_JAX_CACHE`, else in the user's cache directory; None
    where that variable is set to nothing.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = os.environ.get(CACHE_VARIABLE, str(Path(caches, "er_jax")))
    return Path(place) if place else None


def cache_path(about: Mapping[str, str]) -> Path | None:
    """Return the file for costs of such a device and policy, None if none are kept.

    Versions are not part of its name, so what an older one measured is found, refused
    and replaced.
    """
    directory = cache_directory()
    named = [about[name] for name in about if name not in ("jax", "er_jax")]
    return directory / f"costs-{_digest(named)}.json" if directory else None


def recall(engine: Engine, params: PolicyParams, controller: Controller) -> None:
    """Give a controller that may draft, and has timed nothing, what a disk has kept.

    Warns:
      RuntimeWarning: what was kept is of other versions or damaged; measured again.
    """
    table = controller.table
    if len(controller.gammas) < 2 or table.seconds or table.passes is not None:
        return
    kept = _kept(engine, params)
    if kept is not None:
        controller.table = kept


def look(
    engine: Engine,
    params: PolicyParams,
    controller: Controller,
    programs: Sequence[Program],
    *,
    num_stop_ids: int = 8,
    budget_s: float = FIRST_BUDGET_S,
) -> None:
    """Measure what `Controller.first_look` asks for, and tell the controller.

    Args:
      engine, params: what to time. controller: learns. programs: what it asks for.
      num_stop_ids: of the rollout, which then runs the very programs that are compiled.
      budget_s: seconds after which no reading is begun, compilation not counted; one of
        each program there always is.
    """
    each_s, settings = budget_s / len(programs), neutral_sampling(num_stop_ids)
    seconds = {
        program: measure_round(engine, params, program, settings, budget_s=each_s)
        for program in programs
    }
    # The least of several readings stands.
    controller.observe_first_look(seconds, costs.TRUSTED_POSITIONS)


def _kept(engine: Engine, params: PolicyParams) -> LatencyTable | None:
    """Return the costs kept on disk; of several processes, on the leader's."""
    found = text = None
    if engine.is_leader:
        about = conditions(engine, params)
        path = cache_path(about)
        if path is not None and path.is_file():
            try:
                found, text = LatencyTable.load(path, about), path.read_text("utf-8")
            except (ValueError, OSError) as error:
                warnings.warn(f"kept costs are not used: {error}", RuntimeWarning, 4)
            with contextlib.suppress(OSError):
                os.utime(path)  # It was used: others are dropped before it.
    text = engine.agree_text(text)
    if text is None or not engine.is_spread:
        return found
    # All of them from one text: the file may have been replaced meanwhile.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "costs.json")
        copy.write_text(text, "utf-8")
        return LatencyTable.load(copy)


def remember(engine: Engine, params: PolicyParams, controller: Controller) -> None:
    """Keep on disk what a controller that may speculate has learnt, if it is news.

    News are a program that had not been timed, and twice the rounds. Of the files kept
    there, those that were not used for longest are dropped; see `MAX_FILES`.

    Warns:
      RuntimeWarning: it cannot be written.
    """
    # Asked after every rollout: what names the file is only found if there is one.
    is_kept = cache_directory() is not None and len(controller.gammas) > 1
    if not is_kept or not engine.is_leader or not controller.table.is_news:
        return
    about = conditions(engine, params)
    path = cache_path(about)
    assert path is not None
    try:
        controller.table.save(path, about)
        _prune(path)
    except OSError as error:
        warnings.warn(
            f"costs cannot be kept for the next process: {error}; name a directory "
            f"that can be written in {CACHE_VARIABLE}, or set it to nothing",
            RuntimeWarning,
            stacklevel=3,
        )


def _prune(latest: Path) -> None:
    """Drop the costs that were used longest ago, and what was never finished.

    Only files whose names are ours; two processes may do so at once.
    """
    used_s: dict[Path, float] = {}
    for path in latest.parent.iterdir():
        if path != latest and OUR_FILES.fullmatch(path.name):
            with contextlib.suppress(OSError):
                used_s[path] = path.stat().st_mtime
    whole = [path for path in used_s if path.suffix == ".json"]
    whole.sort(key=used_s.__getitem__, reverse=True)
    parts = used_s.keys() - set(whole)
    old = [path for path in parts if used_s[path] < time.time() - ABANDONED_S]
    for path in [*whole[MAX_FILES - 1 :], *old]:
        with contextlib.suppress(OSError):
            path.unlink()


# How much the logarithm of the speed-up is taken to change, at most, from a cell to its
# neighbour at twice the rows or twice the length.
CHANGE_PER_OCTAVE = 0.2

# Where a middling draft is this fast or faster, another length may pay.
NEARLY = 0.9


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a survey found.

    costs: fitted to its readings, one for each program. is_complete: whether it is
      known of every cell if speculation pays there, and where it does what other drafts
      cost; else the time was spent. spent_s: seconds of measuring, compilation not
      counted.
    """

    costs: PassCosts
    is_complete: bool
    spent_s: float


def speed_up(costs: PassCosts, cell: Cell, keep_prob: float) -> float:
    """Return the speed of the measured gamma over plain decoding, the best of several.

    Args:
      costs: with rounds. cell: where. keep_prob: chance of a draft at any depth.
    """
    plain_s = costs.round_seconds(Program(*cell, 0))
    return max(
        expected_tokens([keep_prob] * gamma)
        * plain_s
        / costs.round_seconds(Program(*cell, gamma))
        for gamma in costs.gammas("round")
    )


def survey(
    round_s: Callable[[Program], float],
    rows: Sequence[int],
    lengths: Sequence[int],
    gammas: Sequence[int],
    *,
    keep_prob: float = PRIOR_KEEP,
    budget_s: float = 20.0,
    spent_s: Callable[[], float],
    progress: bool = False,
) -> Survey:
    """Measure rounds until it is known where speculation pays, or the time is spent.

    The corners come first, plain and with a middling draft; then always the cell of
    which it is least certain on which side of 1 its speed-up is: the farther from what
    was measured, and the nearer to 1, the less. When all is known of that, or half of
    the time is spent, the longest and the shortest draft where the middling one pays,
    or nearly: the others lie on a line, see `PassCosts.pass_seconds`. In the time that
    is left all are measured again, and the lesser seconds stand: other work on the
    machine lasts for longer than a reading does.

    Args:
      round_s: times a program; see `measure_round`. rows, lengths: the grid.
      gammas: draft lengths, of which the one nearest to 4 decides where speculation
        pays; 0 always is measured.
      keep_prob: chance of a draft, for the speed-up. budget_s: seconds; a reading begun
        within them is finished. spent_s: seconds spent so far, compilation not counted.
      progress: show a progress bar of the seconds.
    Raises:
      ValueError: an empty grid, no gamma above 0, or no such number.
    """
    for name, values in (("rows", rows), ("lengths", lengths)):
        for value in values:
            check_whole(name, value)
    check_gammas(gammas)
    check_chance("keep_prob", keep_prob)
    check_number("budget_s", budget_s, 0, math.inf, "seconds")
    drafting = sorted({gamma for gamma in gammas if gamma > 0})
    if not drafting or not rows or not lengths:
        raise ValueError(
            f"rows={tuple(rows)}, lengths={tuple(lengths)}, gammas={tuple(gammas)}: a "
            "survey needs a number of rows, a length and a gamma above 0"
        )
    grid = [Cell(*cell) for cell in itertools.product(sorted(rows), sorted(lengths))]
    middle = min(drafting, key=lambda gamma: abs(gamma - 4))
    begin_s, measured = spent_s(), dict[Program, float]()
    bar = tqdm(
        total=budget_s,
        desc="calibration",
        unit="s",
        disable=not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} s{postfix}",
    )

    def is_over(share: float = 1.0) -> bool:
        return spent_s() - begin_s >= share * budget_s

    def measure(cell: Cell, gamma: int) -> None:
        program = Program(*cell, gamma)
        seconds = round_s(program)
        measured[program] = min(seconds, measured.get(program, seconds))
        bar.n = min(spent_s() - begin_s, budget_s)
        bar.set_postfix_str(f"{len(measured)} programs", refresh=True)

    def fit() -> PassCosts:
        table = LatencyTable(seconds=measured)
        return PassCosts(table.readings())

    def uncertainty(cell: Cell, fitted: PassCosts) -> float:
        """How far the speed-up may be on the other side of 1; 0 or less if never."""
        known = {Cell(p.rows, p.cache_length) for p in measured if p.gamma}
        octaves = min(
            abs(math.log2(cell.rows / other.rows))
            + abs(math.log2(cell.length / other.length))
            for other in known
        )
        certain = abs(math.log(speed_up(fitted, cell, keep_prob)))
        return CHANGE_PER_OCTAVE * octaves - certain

    with bar:
        corners = [
            Cell(*cell)
            for cell in itertools.product(
                dict.fromkeys((min(rows), max(rows))),
                dict.fromkeys((min(lengths), max(lengths))),
            )
        ]
        for cell in corners:
            # One pair at least, or there is nothing to say.
            if measured and is_over():
                break
            measure(cell, 0)
            measure(cell, middle)
        is_complete = False
        while not is_over(0.5):
            fitted = fit()
            doubts = {cell: uncertainty(cell, fitted) for cell in grid}
            cell = max(grid, key=doubts.__getitem__)
            if doubts[cell] <= 0:
                is_complete = True
                break
            measure(cell, 0)
            measure(cell, middle)
        fitted = fit()
        known = dict.fromkeys(Cell(p.rows, p.cache_length) for p in measured)
        ups = {cell: speed_up(fitted, cell, keep_prob) for cell in known}
        others = {drafting[-1], drafting[0]} - {middle}
        near = sorted((c for c in known if ups[c] >= NEARLY), key=ups.__getitem__)
        for cell, gamma in itertools.product(reversed(near), sorted(others)):
            if is_over():
                is_complete = False
                break
            measure(cell, gamma)
        for program in list(measured):
            if is_over():
                break
            measure(Cell(program.rows, program.cache_length), program.gamma)
    return Survey(fit(), is_complete, spent_s() - begin_s)


def survey_engine(
    engine: Engine,
    params: PolicyParams,
    rows: Sequence[int],
    lengths: Sequence[int],
    gammas: Sequence[int],
    *,
    keep_prob: float = PRIOR_KEEP,
    budget_s: float = 20.0,
    progress: bool = False,
) -> Survey:
    """Survey the rounds of an engine on this device; arguments as for `survey`."""
    start_s, compiled_s = time.perf_counter(), engine.compile_s

    def spent_s() -> float:
        return time.perf_counter() - start_s - (engine.compile_s - compiled_s)

    return survey(
        lambda program: measure_round(engine, params, program),
        rows,
        lengths,
        gammas,
        keep_prob=keep_prob,
        budget_s=budget_s,
        spent_s=spent_s,
        progress=progress,
    )


def plot_speed_up(
    found: Survey,
    rows: Sequence[int],
    lengths: Sequence[int],
    keep_prob: float,
    path: str | os.PathLike[str],
) -> None:
    """Draw the predicted speed-up over rows and length, measured cells marked; save it.

    Raises:
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    values = [
        [speed_up(found.costs, Cell(r, length), keep_prob) for r in sorted(rows)]
        for length in sorted(lengths)
    ]
    largest = max(abs(math.log(value)) for line in values for value in line) or 1.0
    figure = new_figure(7, 4)
    axes = figure.subplots()
    image = axes.pcolormesh(
        range(len(rows)),
        range(len(lengths)),
        np.log(values),
        cmap="RdBu",
        vmin=-largest,
        vmax=largest,
        shading="nearest",
    )
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small")
    measured = {Cell(r.rows, r.length) for r in found.costs.readings}
    axes.plot(
        [sorted(rows).index(cell.rows) for cell in measured],
        [sorted(lengths).index(cell.length) for cell in measured],
        "ks",
        markerfacecolor="none",
        markersize=26,
        label="measured",
    )
    axes.set_xticks(range(len(rows)), [str(r) for r in sorted(rows)])
    axes.set_yticks(range(len(lengths)), [str(length) for length in sorted(lengths)])
    axes.set(xlabel="rows", ylabel="cache length")
    drafts = ", ".join(str(gamma) for gamma in found.costs.gammas("round"))
    axes.set_title(f"speed-up of drafts of {drafts}, {keep_prob} of them kept")
    figure.colorbar(image, label="log of the speed-up")
    figure.savefig(path, dpi=130)
