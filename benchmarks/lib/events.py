"""What may happen to a life of rollouts, and where.

Events are small values, so that a life is told by a list of them. Numbers that choose
among things that are there are taken modulo how many there are, so that any event may
come at any point of its kind.

Left out: what events do (`living`, `held_call`).
"""

from __future__ import annotations

import dataclasses

from benchmarks.lib.known import Answer

SLOTS = (1, 2, 3)
GAMMAS = ((0,), (0, 2))
NUM_PARAMS, NUM_KEYS, NUM_PROMPTS = 3, 2, 10
TEMPERATURES = (1.0, 0.6, 0.0)
STOPS: tuple[tuple[int, ...], ...] = ((0,), (0, 1), ())

# Prompts and completions are so short that a text has 32 tokens at most: programs for
# prompts of two lengths serve all calls, with one length of the cache.
LONGEST_PROMPT, MOST_NEW = 20, 12

# Bytes that a session may keep of prompts; 768 is one of up to 16 tokens.
PROMPT_BYTES = (0, 800, 2400, 2**20)


# What may happen in a call.


@dataclasses.dataclass(frozen=True)
class Window:
    """A window runs: the `program`-th of those that can, modulo their number.

    rounds: that it may have.
    """

    program: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Give:
    """A turn is answered: the `turn`-th of those that wait, modulo their number."""

    turn: int
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Halt:
    """The call is told to end early."""


@dataclasses.dataclass(frozen=True)
class Break:
    """Ctrl-C, or a failure.

    is_failure: which. at_finish: whether it comes when the next completion is told of,
    while a window runs, and not now.
    """

    is_failure: bool
    at_finish: bool


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing, while all sequences wait for answers."""


# What may happen between calls.


@dataclasses.dataclass(frozen=True)
class Style:
    """How a call is made, which decides no token.

    slots, gammas: the latter an index of `GAMMAS`. draft: index of parameters.
    is_stoppable: whether it can be told to end early. finished, groups, tokens: see
    `Until`; None is no limit. from_file: whether it reads what it resumes.
    is_noted: whether the journal notes what runs.
    """

    slots: int = 3
    gammas: int = 1
    draft: int = 0
    is_stoppable: bool = True
    finished: int | None = None
    groups: int | None = None
    tokens: int | None = None
    from_file: bool = False
    is_noted: bool = True


@dataclasses.dataclass(frozen=True)
class Begin:
    """A request begins, perhaps with completions of the one before.

    prompts: numbers of prompts of the life. n: completions of each. key, temperature,
    stops: indices. limit: tokens of a completion. turn_tokens, max_turns: see
    `Respond`. carried: how many prompts of the request before are in front of these,
    with their completions.
    """

    prompts: tuple[int, ...]
    n: int
    key: int
    temperature: int
    stops: int
    limit: int
    is_answered: bool
    turn_tokens: int | None
    max_turns: int | None
    carried: int
    has_journal: bool
    style: Style


@dataclasses.dataclass(frozen=True)
class GoOn:
    """The request goes on.

    raised: by how many tokens the limit is.
    is_answered: whether turns are, now. has_journal: whether it has a journal, the one
    that there is if the call may go on with that. None: as before.
    """

    raised: int
    is_answered: bool | None
    has_journal: bool | None
    style: Style


@dataclasses.dataclass(frozen=True)
class Learn:
    """Other parameters, or earlier ones again: an index."""

    params: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A session begins, with room for so many bytes of prompts; None: there is none."""

    prompt_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Tear:
    """The end of the journal is lost, as by a kill: a share of it stays, 0 to 1."""

    share: float


@dataclasses.dataclass(frozen=True)
class End:
    """The life ends, wherever it is."""


Event = (
    Window | Give | Halt | Break | Wait | Begin | GoOn | Learn | Share | Tear | End
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """Where something may happen.

    kind: "between" calls, before a "window", or "waiting" for answers.
    rooms: of the turns that wait for an answer, tokens that it may have.
    can_halt: whether the call can be told to end early, and has not been.
    can_go_on: whether there is a request. is_over: whether all of its completions are.
    has_journal: whether it has a journal. can_change: whether nothing has changed since
    the last call.
    """

    kind: str
    rooms: tuple[int, ...] = ()
    can_halt: bool = False
    can_go_on: bool = False
    is_over: bool = False
    has_journal: bool = False
    can_change: bool = False
