"""Chains of lives of one rollout: all that may be chosen about them, by a seed.

A life is one process that makes the call. All lives of a chain ask for the same, each
in its own way (slots, draft lengths, what drafts see, mesh), and each but the last ends
by an interrupt. Sizes are taken from short lists, so that lives share programs.

Left out: what a life does (`life_process`), what must survive it (`survival`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

VOCAB_SIZE, STOP = 24, 0

# Kinds of interrupts. The second SIGTERM meets a handler that calls an `er_jax.Stop`.
UNTIL, CTRL_C, TERM, TERM_STOP, KILL = KINDS = (
    *("until", "Ctrl-C", "SIGTERM", "SIGTERM to Stop", "SIGKILL"),
)

# Moments: during the n-th event of a kind, or at any time.
WINDOW, PREFILL, COMPACTION, GROWTH, TOOL, JOURNAL, FINISH, ANY = MOMENTS = (
    *("window", "prefill", "compaction", "growth", "tool", "journal"),
    *("on_finish", "any time"),
)

LIMITS = ("tokens", "finished", "groups")
"""Limits of `Until` that a life may end by, in place of a moment."""

AT_LIMIT = "limit"

# Positions of a whole text: the first fit one cache, the second outgrow a shorter one.
LENGTHS = {"short": 64, "long": 196}
LONGEST_PROMPT = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all lives of a chain ask for.

    seed: of the answers and the key. prompts: of 1 to 16 tokens. n: completions of
    each. max_new_tokens: of a completion, by prompt. stops: token ids.
    is_answered: whether turns are. turn_tokens, max_turns: see `Respond`.
    tool_s: seconds of an answer. dtype: of the policy.
    """

    seed: int
    prompts: tuple[tuple[int, ...], ...]
    n: int
    max_new_tokens: tuple[int, ...]
    stops: tuple[int, ...] = (STOP,)
    is_answered: bool = False
    turn_tokens: int | None = None
    max_turns: int | None = None
    tool_s: float = 0.0
    dtype: str = "float64"

    @property
    def count(self) -> int:
        """The number of completions."""
        return self.n * len(self.prompts)

    @property
    def limits(self) -> list[int]:
        """The most tokens of each completion."""
        return [limit for limit in self.max_new_tokens for _ in range(self.n)]

    def answer(self, sequence_id: int, tokens: Sequence[int]) -> list[int] | None:
        """Return the answer to a completion so far: one to three tokens, or None."""
        number = self.seed + sequence_id + sum(tokens) + 7 * len(tokens)
        if number % 7 == 0:
            return None
        return [1 + (number + i) % (VOCAB_SIZE - 1) for i in range(1 + number % 3)]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a life makes the call, which decides no token.

    mesh: sizes of the axes data and model; None is one device. slots, control, gammas:
    as for `RolloutConfig`. rows: batch sizes that its controller takes.
    window: positions that drafts see beside the first 2; None is all.
    """

    mesh: tuple[int, int] | None
    slots: int
    rows: tuple[int, ...]
    control: str
    gammas: tuple[int, ...]
    window: int | None = None


# What lives of a kind of workload may do; sizes that repeat share programs.
ONE_DEVICE = (
    Way(None, 4, (1, 4), "ar", (0,)),
    Way(None, 4, (1, 4), "best", (0, 2)),
    Way(None, 2, (1, 2), "fixed:2", (0, 2)),
    Way(None, 2, (1, 2), "best", (0, 4), window=8),
)
MESHES = (
    Way((2, 2), 4, (1, 4), "best", (0, 2)),
    Way((4, 2), 8, (4, 8), "fixed:2", (0, 2)),
)
LONG = (
    Way(None, 4, (1, 4), "ar", (0,)),
    Way(None, 2, (1, 2), "best", (0, 4), window=8),
    Way((2, 2), 4, (2, 4), "fixed:2", (0, 2)),
)


@dataclasses.dataclass(frozen=True)
class Interrupt:
    """How a life ends early.

    kind, moment: one of `KINDS`, and of `MOMENTS` or `AT_LIMIT`. nth: which event of
    the moment, from 1. is_before: whether it comes before what the event does, or after
    that and before anybody has the result.
    limit: a limit of `Until`, and its value. delay_s: until any time comes.
    """

    kind: str
    moment: str
    nth: int = 1
    is_before: bool = True
    limit: tuple[str, int] | None = None
    delay_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Life:
    """One process.

    number: in its chain, the version of its tokens. seed: of its controller's choices.
    rounds: of its windows. every_s: seconds between two notes of rows that run.
    goes_on: whether it resumes what the life before returned, with a new journal, if
    that returned anything.
    interrupt: None where it runs to the end.
    """

    number: int
    seed: int
    way: Way
    rounds: int
    every_s: float
    goes_on: bool
    interrupt: Interrupt | None


@dataclasses.dataclass(frozen=True)
class Chain:
    """A workload and its lives; the last has no interrupt."""

    seed: int
    workload: Workload
    lives: tuple[Life, ...]


def drawn(
    seed: int, *, most_lives: int = 5, meshes: bool = True, long: bool = True
) -> Chain:
    """Return the chain of a seed.

    Args:
      seed: any number. most_lives: of it, at least 2.
      meshes, long: whether there may be any, and long texts.
    """
    rng = random.Random(seed)
    is_long = long and rng.random() < 0.3
    dtype = "float32" if rng.random() < 0.15 else "float64"
    workload = _workload(rng, seed, LENGTHS["long" if is_long else "short"], dtype)
    ways: tuple[Way, ...] = LONG if is_long else (*ONE_DEVICE, *MESHES)
    ways = tuple(way for way in ways if meshes or way.mesh is None)
    if dtype == "float32":
        ways = tuple(way for way in ways if way.window is None)
    lives = []
    count = rng.randint(2, most_lives)
    before: Way | None = None
    for number in range(count):
        way = rng.choice([way for way in ways if way != before])
        life = Life(
            number=number,
            seed=rng.randrange(2**31),
            way=way,
            rounds=rng.randint(1, 4),
            every_s=rng.choice((0.0, 0.0, 5.0)),
            goes_on=rng.random() < 0.5,
            interrupt=None if number == count - 1 else _interrupt(rng, workload),
        )
        lives.append(life)
        before = way
    return Chain(seed, workload, tuple(lives))


def _workload(rng: random.Random, seed: int, length: int, dtype: str) -> Workload:
    def prompt() -> tuple[int, ...]:
        size = rng.randint(1, LONGEST_PROMPT)
        return tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(size))

    prompts = [prompt() for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        prompts[1] = (*prompts[0], *prompts[1])[:LONGEST_PROMPT]
    is_answered, most = rng.random() < 0.5, length - LONGEST_PROMPT
    return Workload(
        seed=seed,
        prompts=tuple(prompts),
        n=rng.choice((2, 3)) if len(prompts) < 4 else 2,
        max_new_tokens=tuple(rng.choice((most, most, most // 3)) for _ in prompts),
        # Texts that are to be long end by a stop only where turns do.
        stops=(STOP,) if is_answered or length == LENGTHS["short"] else (),
        is_answered=is_answered,
        turn_tokens=rng.choice((None, 12)) if is_answered else None,
        max_turns=rng.choice((None, 4)) if is_answered else None,
        tool_s=rng.choice((0.0, 0.002, 0.02)) if is_answered else 0.0,
        dtype=dtype,
    )


def _interrupt(rng: random.Random, workload: Workload) -> Interrupt:
    kind = rng.choice(KINDS)
    moments: list[str] = [WINDOW, PREFILL, COMPACTION, GROWTH, JOURNAL, FINISH, ANY]
    if workload.is_answered:
        moments += [TOOL, TOOL]
    if kind == UNTIL:
        moments.append(AT_LIMIT)
    moment = rng.choice(moments)
    most = {WINDOW: 8, JOURNAL: 4, TOOL: 3, FINISH: 2, PREFILL: 2}.get(moment, 1)
    limit = None
    if moment == AT_LIMIT:
        name = rng.choice(LIMITS)
        limit = (name, rng.randint(1, 40 if name == "tokens" else 3))
    return Interrupt(
        kind=kind,
        moment=moment,
        nth=rng.randint(1, most),
        is_before=rng.random() < 0.5,
        limit=limit,
        delay_s=rng.uniform(0.1, 0.7),
    )


def told(chain: Chain) -> dict[str, Any]:
    """Return a chain as JSON values, for the record of a difference."""
    return dataclasses.asdict(chain)
