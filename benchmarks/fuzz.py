"""Random schedules, every completion compared with an independent reference.

    python -m benchmarks.fuzz                            # 2 400 schedules
    python -m benchmarks.fuzz --seed 17 --schedules 1    # one of them again

A schedule is all that may be chosen about a rollout: policy, draft, acceptance rule,
prompts, settings, slots, and a controller that takes any program at any window, so that
the batch is compacted, grown and refilled at every turn. Some of its completions are
then sampled once more, each alone by its sequence id. The policies are small, and some
of them poisoned: a token or a position whose entries overflow.

With `coupled`, and at temperature 0 with any rule, tokens have to be those of
`reference.Reference.completion`; in float32 up to ties. Else every token must have been
possible. Either way log-probabilities, ends and the arrays around them are checked.

A difference is printed with its seed, written into the record, and the exit code is 1.
Nothing depends on the clock or on what was compiled before, so a seed repeats it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tyro
from tqdm import tqdm

import er_jax
from benchmarks import measure
from benchmarks.reference import Found, Reference
from er_jax.acceptance import ACCEPT_RULES, AcceptRule
from er_jax.config import LOGPROB_KINDS
from er_jax.costs.table import LatencyTable
from er_jax.engine import kept
from er_jax.figures import text_table
from er_jax.scheduler import batch, loop
from er_jax.types import NONE, Params, Policy, Program, Sampling
from tests.learned import Learned, poisoned
from tests.toy import Toy, toy_params

# Texts as long as this end at the end of a table of positions. The short ones fit the
# smallest cache; the long ones outgrow one and go on in another.
MAX_LENGTH = {"short": 36, "long": 200}
LONGEST_PROMPT = 16
LEAST_LONG = 177
"""New tokens from which on there are two cache lengths."""

LEARNED = "learned positions"
POISONED = ("poisoned token", "poisoned position", "poisoned prompt")
POLICIES = ("decoder", "toy", LEARNED, *POISONED)
DRAFTS = ("itself", "stale", "other seed", "NaN")

# Noise in the weights of a stale draft, in standard deviations of a weight.
STALE = 0.2


@dataclasses.dataclass(frozen=True)
class Family:
    """Schedules that share compiled programs, of which there should be few.

    architecture: "decoder", "toy", or "library" or "plain", learned positions with
      either attention. rule, dtype, size: the same for all; "short" or "long".
    rows, gammas: what may be run; both in all combinations. gammas contain 0.
    """

    architecture: str
    rule: AcceptRule
    rows: tuple[int, ...]
    gammas: tuple[int, ...]
    dtype: str = "float64"
    size: str = "short"


FAMILIES = (
    Family("decoder", "coupled", (1, 2, 8), (0, 1, 4)),
    Family("decoder", "token", (1, 4), (0, 2, 7)),
    Family("decoder", "block", (1, 8), (0, 1, 4)),
    Family("toy", "coupled", (1, 4, 8), (0, 2, 7)),
    Family("toy", "token", (1, 2, 8), (0, 1, 4)),
    Family("toy", "block", (1, 4, 8), (0, 2, 7)),
    Family("library", "coupled", (1, 2, 8), (0, 2, 7)),
    Family("library", "token", (1, 8), (0, 1, 4)),
    Family("library", "block", (1, 4), (0, 2, 7)),
    Family("plain", "coupled", (1, 4, 8), (0, 1, 4)),
    Family("plain", "token", (1, 4), (0, 2, 7)),
    Family("plain", "block", (1, 8), (0, 1, 4)),
    Family("decoder", "coupled", (1, 4), (0, 4), "float32"),
    Family("library", "coupled", (1, 4), (0, 4), "float32"),
    Family("plain", "block", (1, 4), (0, 2), "float32"),
    Family("decoder", "coupled", (1, 4), (0, 4), size="long"),
    Family("plain", "coupled", (1, 4), (0, 7), size="long"),
    Family("library", "token", (1, 4), (0, 2), size="long"),
)

# Every policy and every rule, with few programs.
QUICK_FAMILIES = (
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("toy", "token", (4,), (0, 2)),
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("library", "block", (4,), (0, 2)),
    Family("plain", "coupled", (1, 4), (0, 4)),
    Family("decoder", "coupled", (4,), (0, 2)),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      schedules: how many. seed: of the first; every schedule has the next one.
      out: where to write. quick: few programs, and at most 60 schedules.
    """

    schedules: int = 2400
    seed: int = 0
    out: Path | None = None
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All that is chosen about one rollout; plain values.

    seed: of the schedule, of its controller and of the sampling key. family: see
      `Family`. policy: one of `POLICIES`. poison: {"token": t} or {"position": p}, or
      nothing. draft: one of `DRAFTS`.
    prompts, config: of the rollout, the latter by names of `RolloutConfig`.
    sequence_ids: of its completions. rounds: of the longest window. alone: completions
      that are sampled once more by themselves.
    """

    seed: int
    family: Family
    policy: str
    poison: dict[str, int]
    draft: str
    prompts: tuple[tuple[int, ...], ...]
    config: dict[str, Any]
    sequence_ids: tuple[int, ...]
    rounds: int
    alone: tuple[int, ...]


@dataclasses.dataclass
class Outcome:
    """What a schedule did, and what was wrong with it.

    counts: by name, numbers to add up over schedules. compile_s: seconds of compiling
    the rollouts' programs. problems: in words, none if all is well.
    """

    schedule: Schedule
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=lambda: collections.Counter(schedules=1)
    )
    compile_s: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


def policy_of(family: Family) -> Policy:
    """Return the policy of a family; parameters apart."""
    max_length = MAX_LENGTH[family.size]
    if family.architecture == "toy":
        return Toy(vocab_size=5, dtype=family.dtype)
    if family.architecture == "decoder":
        return er_jax.Decoder(
            er_jax.DecoderConfig(
                vocab_size=13, dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
                hidden_dim=32, max_length=max_length, dtype=family.dtype,
            )
        )  # fmt: skip
    return Learned(
        max_length=max_length, attention=family.architecture, dtype=family.dtype
    )


@functools.lru_cache
def healthy_params(family: Family, seed: int) -> Params:
    """Return parameters of a family's policy as NumPy arrays."""
    policy = policy_of(family)
    if isinstance(policy, Toy):
        return toy_params(policy, seed=seed)
    if isinstance(policy, Learned):
        return policy.init(seed)
    assert isinstance(policy, er_jax.Decoder)
    return jax.device_get(policy.init(jax.random.key(seed)))


def stale_params(params: Params, seed: int) -> Params:
    """Return parameters as they were some updates ago: others, and not by much."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        noise = STALE * leaf.std() * rng.standard_normal(leaf.shape)
        return (leaf + noise).astype(leaf.dtype)

    return jax.tree.map(moved, params)


@functools.lru_cache
def decoder_draft(family: Family, draft: str) -> Params:
    """Return a quantized draft of a family's decoder."""
    params = healthy_params(family, int(draft == "other seed"))
    if draft == "stale":
        params = stale_params(params, 0)
    quantized = jax.device_get(er_jax.quantize(params, er_jax.DrafterConfig()))
    return _filled_with_nan(quantized) if draft == "NaN" else quantized


def _filled_with_nan(params: Params) -> Params:
    def fill(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        is_real = np.issubdtype(leaf.dtype, np.floating)
        return np.full_like(leaf, np.nan) if is_real else leaf

    return jax.tree.map(fill, params)


def params_of(schedule: Schedule) -> er_jax.PolicyParams:
    """Return target and draft of a schedule."""
    family = schedule.family
    params = healthy_params(family, 0)
    if schedule.poison:
        params = poisoned(params, **schedule.poison)
    if family.architecture == "decoder":
        draft = decoder_draft(family, schedule.draft)
    elif schedule.draft == "other seed":
        draft = healthy_params(family, 1)
    elif schedule.draft == "stale":
        draft = stale_params(healthy_params(family, 0), schedule.seed)
        draft = poisoned(draft, **schedule.poison) if schedule.poison else draft
    elif schedule.draft == "NaN":
        draft = _filled_with_nan(params)
    else:
        draft = params
    return er_jax.PolicyParams(policy=params, draft=draft)


def drawn(seed: int, families: Sequence[Family] = FAMILIES) -> Schedule:
    """Return the schedule of a seed."""
    rng = np.random.default_rng(seed)
    family = families[seed % len(families)]
    max_length = MAX_LENGTH[family.size]
    is_long = family.size == "long"
    vocab_size = policy_of(family).vocab_size

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    prompts = _drawn_prompts(rng, vocab_size)
    if is_long:
        prompts = prompts[:2]
    n = pick(1, 2, 3, 4)
    if len(prompts) * n < 3:  # too few to fill even the least of batches
        n = 4
    longest = max(map(len, prompts))
    room = max_length - longest
    # Often all of the positions that the policy has.
    least = min(LEAST_LONG if is_long else 1, room)
    max_new_tokens = pick(room, room, int(rng.integers(least, room + 1)))

    policy, poison = family.architecture, {}
    if policy in ("library", "plain"):
        # Long ones would end soon where a token is poisoned.
        names = (LEARNED, *POISONED)
        policy = pick(LEARNED, "poisoned position") if is_long else pick(*names)
    token, position = int(rng.integers(vocab_size)), int(rng.integers(longest))
    if policy == "poisoned token":
        poison = {"token": token}
        # What is left of it is in completions.
        other = (token + 1) % vocab_size
        prompts = tuple(
            tuple(other if t == token else t for t in prompt) for prompt in prompts
        )
    elif policy == "poisoned position":
        poison = {"position": int(rng.integers(longest, longest + max_new_tokens))}
    elif policy == "poisoned prompt":
        poison = pick({"token": pick(*prompts[0])}, {"position": position})

    count = len(prompts) * n
    slots = [rows for rows in family.rows if rows < 2 * count] or [1]
    gammas = {0, *(gamma for gamma in family.gammas if rng.random() < 0.7)}
    control = "best"
    if rng.random() < 0.15:
        control = f"fixed:{pick(*family.gammas)}"
    num_stops = pick(0, 1) if is_long else pick(0, 0, 1, 2)
    config = {
        "max_new_tokens": max_new_tokens,
        "n": n,
        "temperature": pick(0.0, 0.3, 0.7, 1.0, 1.0, 1.6),
        "top_k": pick(0, 0, 2, 4),
        "top_p": pick(1.0, 1.0, 0.6, 0.9),
        "min_p": pick(0.0, 0.0, 0.05, 0.2),
        "stop_token_ids": tuple(rng.choice(vocab_size, num_stops, False).tolist()),
        "pad_id": pick(0, -1),
        "logprobs": pick(*LOGPROB_KINDS),
        "gammas": tuple(sorted(gammas)),
        "control": control,
        "max_slots": pick(slots[-1], *slots),
    }
    alone: list[int] = []
    if 1 in family.rows and rng.random() < 0.3:
        alone = rng.choice(count, min(count, 2), False).tolist()
    return Schedule(
        seed=seed,
        family=family,
        policy=policy,
        poison=poison,
        draft=pick(*DRAFTS),
        prompts=prompts,
        config=config,
        sequence_ids=_drawn_ids(rng, count),
        rounds=int(rng.integers(1, 7)) * (4 if is_long else 1),
        alone=tuple(alone),
    )


def _drawn_prompts(
    rng: np.random.Generator, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Return one to six prompts: ragged or all as long, some of them twice."""
    prompts: list[tuple[int, ...]] = []
    most = int(rng.integers(1, LONGEST_PROMPT + 1))
    is_ragged = rng.random() < 0.7
    for _ in range(rng.integers(1, 7)):
        length = int(rng.integers(1, most + 1)) if is_ragged else most
        prompt = tuple(rng.integers(0, vocab_size, length).tolist())
        if prompts and rng.random() < 0.3:
            prompt = prompts[rng.integers(len(prompts))]
        prompts.append(prompt)
    return tuple(prompts)


def _drawn_ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Return distinct names: small numbers in any order, or any numbers at all."""
    most = 2 * count if rng.random() < 0.5 else 2**31 - 1
    ids: list[int] = []
    while len(ids) < count:
        new = int(rng.integers(most))
        ids += [new] if new not in ids else []
    return tuple(ids)


class _Untimed(LatencyTable):
    """A table that knows enough for nothing to be measured, and learns nothing."""

    def observe(self, program: Program, seconds: float, num_rounds: int) -> None:
        pass

    def round_seconds(self, program: Program) -> float:
        return 1.0  # so a window is the shortest that there is


class Restless(er_jax.Controller):
    """Takes any program that can run, at random, at every window.

    Args:
      control, gammas: as for `Controller`. rows: batch sizes that may be used.
      seed: of its choices.
    """

    def __init__(
        self, control: str, gammas: Sequence[int], rows: Sequence[int], seed: int
    ) -> None:
        super().__init__(control, gammas)
        self.table = _Untimed({Program(1, 64, 1): 1.0})
        self._rows = frozenset(rows)
        self._rng = np.random.default_rng(seed)

    def choose(
        self, options: Sequence[Program], current: Program | None, **unused: Any
    ) -> Program:
        """Return one of the options."""
        allowed = [p for p in options if p.rows in self._rows] or [options[-1]]
        return allowed[self._rng.integers(len(allowed))]


@contextlib.contextmanager
def _short_windows(rounds: int) -> Iterator[None]:
    """Have windows end after so many rounds, whatever the clock says.

    And whatever has been compiled: a program's first window is otherwise one of one
    round, and a schedule would depend on those before it.
    """
    with (
        mock.patch.multiple(loop, WINDOW_S=0.0, MIN_ROUNDS=rounds),
        mock.patch.object(batch.Batch, "_is_compiled", lambda self, program: True),
        warnings.catch_warnings(),
    ):
        # Poison and broken drafts are what is wanted here.
        warnings.filterwarnings("ignore", ".*non-finite logit", RuntimeWarning)
        warnings.filterwarnings("ignore", "drafts were kept", RuntimeWarning)
        yield


def run(schedule: Schedule) -> Outcome:
    """Run a schedule and compare all that it returns."""
    with jax.enable_x64(schedule.family.dtype == "float64"):
        return _run(schedule)


def _run(schedule: Schedule) -> Outcome:
    family = schedule.family
    policy = policy_of(family)
    params = jax.tree.map(jax.numpy.asarray, params_of(schedule))
    key = jax.random.key(schedule.seed)
    config = er_jax.RolloutConfig(accept=family.rule, **schedule.config)
    reference = Reference(
        policy,
        params.policy,
        settings_of(config, key),
        max_new_tokens=config.max_new_tokens,
        length=MAX_LENGTH[family.size],
        dtype=family.dtype,
    )
    outcome = Outcome(schedule)
    everything = list(range(len(schedule.sequence_ids)))
    for rows in (everything, *([row] for row in schedule.alone)):
        if rows == everything:
            own, prompts = config, list(schedule.prompts)
        else:
            own = dataclasses.replace(config, n=1)
            prompts = [schedule.prompts[row // config.n] for row in rows]
        ids = [schedule.sequence_ids[row] for row in rows]
        controller = Restless(
            config.control, config.gammas, family.rows, schedule.seed + rows[0]
        )
        try:
            with _short_windows(schedule.rounds):
                out = er_jax.rollout(
                    policy, params, prompts, key=key, config=own, sequence_ids=ids,
                    controller=controller,
                )  # fmt: skip
        except Exception as error:
            # Whatever it is, it is to be known with the seed that it came of.
            outcome.problems.append(f"raised {type(error).__name__}: {error}")
            continue
        bad, compared = compare(reference, prompts, own, ids, out)
        is_alone = len(rows) < len(everything)
        outcome.problems += [f"alone, {line}" if is_alone else line for line in bad]
        outcome.counts.update(compared + counts_of(out))
        outcome.counts["alone"] += is_alone
        outcome.compile_s += out.stats.seconds["compile"]
    outcome.counts["differences"] = len(outcome.problems)
    return outcome


def settings_of(config: er_jax.RolloutConfig, key: jax.Array) -> Sampling:
    """Return what is traced of a configuration, as the reference needs it."""
    stops = [*config.stop_token_ids, NONE]
    return Sampling(
        key=np.asarray(jax.random.key_data(key)),
        temperature=np.float32(config.temperature),
        top_k=np.int32(config.top_k),
        top_p=np.float32(config.top_p),
        min_p=np.float32(config.min_p),
        stop_ids=np.array((stops * 2)[:4], np.int32),
        logprob_kind=np.int32(LOGPROB_KINDS.index(config.logprobs)),
    )


def compare(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    config: er_jax.RolloutConfig,
    ids: Sequence[int],
    out: er_jax.Rollout,
) -> tuple[list[str], collections.Counter[str]]:
    """Return what is wrong with a rollout, and counts of what was compared."""
    counts: collections.Counter[str] = collections.Counter()
    bad = misplaced(prompts, config, ids, out)
    is_decided = config.accept == "coupled" or config.temperature == 0
    for row, sequence_id in enumerate(ids):
        prompt = prompts[row // config.n]
        length = int(out.lengths[row])
        found = Found(
            tuple(out.completion_ids[row, :length].tolist()),
            tuple(out.logprobs[row, :length].tolist()),
            str(out.finish_reason[row]),
        )
        wrong = reference.problems(prompt, found)
        if is_decided:
            expected = reference.completion(prompt, sequence_id, found.tokens)
            counts["ties"] += expected.num_ties
            if (found.tokens, found.reason) != (expected.tokens, expected.reason):
                wrong.append(f"{found.tokens}, {found.reason!r}, is not {expected}")
        bad += [f"completion {row}, sequence {sequence_id}: {line}" for line in wrong]
        counts["completions"] += 1
        counts["decided"] += is_decided
        counts["tokens"] += length
        counts[f"ended by {found.reason}"] += 1
        counts["at the limit"] += len(prompt) + length == reference.length
    return bad, counts


def misplaced(
    prompts: Sequence[Sequence[int]],
    config: er_jax.RolloutConfig,
    ids: Sequence[int],
    out: er_jax.Rollout,
) -> list[str]:
    """Return what is wrong with the arrays around the completions."""
    bad = []
    if out.sequence_ids.tolist() != list(ids):
        bad.append(f"sequence_ids are {out.sequence_ids.tolist()}, not {list(ids)}")
    for row in range(len(ids)):
        kept = out.prompt_ids[row][out.prompt_mask[row]]
        if kept.tolist() != list(prompts[row // config.n]):
            bad.append(f"prompt_ids[{row}] holds {kept.tolist()}")
    places = np.arange(config.max_new_tokens)[None]
    is_sampled = places < out.lengths[:, None]
    if not np.array_equal(out.completion_mask, is_sampled):
        bad.append("completion_mask is not that of the lengths")
    if (out.completion_ids[~is_sampled] != config.pad_id).any():
        bad.append("completion_ids hold more than pad_id behind a completion")
    if (out.logprobs[~is_sampled] != 0).any():
        bad.append("logprobs are not 0 behind a completion")
    if out.stats.num_tokens != out.lengths.sum():
        bad.append(f"stats count {out.stats.num_tokens} tokens of {out.lengths.sum()}")
    return bad


def counts_of(out: er_jax.Rollout) -> collections.Counter[str]:
    """Return what a rollout did: windows, and how the batch changed between them."""
    moments = out.stats.timeline
    counts: collections.Counter[str] = collections.Counter(
        windows=len(moments), cloned=out.stats.num_cloned
    )
    for old, new in itertools.pairwise(moments):
        counts["switches"] += old[4:7] != new[4:7]  # rows, cache length, gamma
        counts["fewer rows"] += new.rows < old.rows
        counts["more rows"] += new.rows > old.rows
        counts["longer cache"] += new.cache_length > old.cache_length
        counts["shorter cache"] += new.cache_length < old.cache_length
        counts["refills"] += new.live > old.num_live_after
    for gamma, histogram in out.stats.accepted.items():
        counts["drafted"] += gamma * int(histogram.sum())
        counts["kept"] += int(np.arange(gamma + 1) @ histogram)
    return counts


def fuzz(schedules: Sequence[Schedule], again: str = "") -> list[Outcome]:
    """Run schedules, those of a family together; print each difference at once.

    Args:
      schedules: in any order.
      again: options of the command that runs one of them again, but for the seed.
    """
    ordered = sorted(schedules, key=lambda s: (_name(s.family), s.seed))
    outcomes = []
    with tqdm(total=len(ordered), unit="schedule") as bar:
        for family, own in itertools.groupby(ordered, key=lambda s: s.family):
            bar.set_postfix_str(_name(family), refresh=False)
            for schedule in own:
                outcome = run(schedule)
                outcomes.append(outcome)
                bar.update()
                if outcome.problems:
                    bar.write(told(outcome, again))
            # Linux has room for some hundred programs in a process.
            kept.forget_engines()
    return outcomes


def _name(family: Family) -> str:
    return f"{family.architecture} {family.rule} {family.dtype} {family.size}"


def told(outcome: Outcome, again: str = "") -> str:
    """Return what was wrong with a schedule, and how to see it again."""
    command = f"python -m benchmarks.fuzz --seed {outcome.schedule.seed} --schedules 1"
    lines = [f"DIFFERENCE, again by: {command}{again}", str(outcome.schedule)]
    return "\n".join(lines + outcome.problems)


def points_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a point for each policy, attention, rule and dtype: sums of the counts."""
    Name = tuple[str, str, str, str]
    sums: dict[Name, collections.Counter[str]] = {}
    rows: dict[Name, int] = {}
    for outcome in outcomes:
        schedule, family = outcome.schedule, outcome.schedule.family
        attention = "plain" if family.architecture == "plain" else "library"
        if schedule.policy == "toy":
            attention = "none"
        name = (schedule.policy, attention, family.rule, family.dtype)
        sums.setdefault(name, collections.Counter()).update(outcome.counts)
        rows[name] = max(rows.get(name, 0), *family.rows)
    order = sorted(sums, key=lambda name: (POLICIES.index(name[0]), *name[1:]))
    return [
        {
            "preset": name[0],
            "attention": name[1],
            "rule": name[2],
            "dtype": name[3],
            "rows": rows[name],
            **dict(sorted(sums[name].items())),
        }
        for name in order
    ]


# Columns of the table, and what is added up in them.
COLUMNS = {
    "completions": "completions",
    "token for token": "decided",
    "again alone": "alone",
    "tokens": "tokens",
    "ended non-finite": "ended by nonfinite",
    "at the last position": "at the limit",
    "windows": "windows",
    "switches of program": "switches",
    "refills": "refills",
    "ties": "ties",
    "differences": "differences",
}


def total(points: Sequence[Mapping[str, Any]], name: str, **of: str) -> int:
    """Return the sum of a count over the points that are of something."""
    chosen = [p for p in points if all(p[key] == of[key] for key in of)]
    return sum(point.get(name, 0) for point in chosen)


def rows_of(
    points: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Return header and rows: one for each policy and attention, and one for all."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["preset"], point["attention"]), []).append(point)
    groups["all", ""] = list(points)
    rows = [
        (
            *name,
            *(total(own, "schedules", rule=rule) for rule in ACCEPT_RULES),
            *(total(own, key) for key in COLUMNS.values()),
        )
        for name, own in groups.items()
    ]
    schedules = [f"schedules, {rule}" for rule in ACCEPT_RULES]
    return ("policy", "attention", *schedules, *COLUMNS), rows


def summary(record: Mapping[str, Any]) -> str:
    """Return what stands behind the table in two sentences."""
    settings, points = record["settings"], record["points"]
    count = functools.partial(total, points)
    last = settings["seed"] + settings["schedules"] - 1
    return (
        f"Seeds {settings['seed']} to {last}, {count('schedules', dtype='float32')} "
        f"of them in float32: {count('kept')} of {count('drafted')} drafts kept; rows "
        f"became fewer {count('fewer rows')} times and more {count('more rows')} "
        f"times, the cache longer {count('longer cache')} and shorter "
        f"{count('shorter cache')} times; {count('cloned')} completions started from "
        f"entries already there. {record['seconds']:.0f} s, of them "
        f"{record['compile_s']:.0f} s compiling."
    )


def main(args: Args) -> dict[str, Any]:
    """Run, print a table, write and return the record.

    Raises:
      SystemExit: something differed; the record says what.
    """
    if args.quick:
        args = dataclasses.replace(args, schedules=min(args.schedules, 60))
    settings = dataclasses.asdict(args)
    del settings["out"]
    record = measure.new_record("fuzz", settings)
    families = QUICK_FAMILIES if args.quick else FAMILIES
    start = time.perf_counter()
    outcomes = fuzz(
        [drawn(args.seed + i, families) for i in range(args.schedules)],
        " --quick" if args.quick else "",
    )
    record["seconds"] = time.perf_counter() - start
    record["compile_s"] = sum(outcome.compile_s for outcome in outcomes)
    record["points"] = points_of(outcomes)
    record["differences"] = [
        {"schedule": dataclasses.asdict(o.schedule), "problems": o.problems}
        for o in outcomes
        if o.problems
    ]
    measure.save(measure.results_dir(args.out, args.quick) / "fuzz.json", record)
    header, rows = rows_of(record["points"])
    print(text_table(rows, header))
    print(summary(record))
    if record["differences"]:
        seeds = [found["schedule"]["seed"] for found in record["differences"]]
        raise SystemExit(f"{len(seeds)} schedules differ, seeds {seeds}; see above")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.fuzz"))
