"""Rollouts whose processes are killed: every signal at every moment, and the checker.

python -m benchmarks.killed    # chains of lives drawn at random
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import killed
from benchmarks.lib import records, survival
from benchmarks.lib.chains import (
    COMPACTION,
    CTRL_C,
    FINISH,
    GROWTH,
    JOURNAL,
    KILL,
    KINDS,
    PREFILL,
    TERM,
    TERM_STOP,
    TOOL,
    UNTIL,
    WINDOW,
    Chain,
    Interrupt,
    Life,
    Way,
    Workload,
    drawn,
)
from benchmarks.lib.known import Difference
from benchmarks.lib.survival import Kept, Survival
from er_jax.journal_format import MAGIC, REQUEST, Piece, record
from er_jax.types import Finish

# The second has the programs of the rollout that nothing disturbs.
WAYS = (
    Way(None, 2, (1, 2), "fixed:2", (0, 2)),
    Way(None, 4, (4,), "ar", (0,)),
)
MESHES = (WAYS[1], Way((2, 2), 4, (4,), "ar", (0,)), Way((4, 2), 8, (8,), "ar", (0,)))

# Each a rollout: what interrupts its lives, one after the other.
CHAINS = (
    ((KILL, PREFILL), (KILL, JOURNAL), (KILL, TOOL), (KILL, WINDOW)),
    ((CTRL_C, WINDOW), (CTRL_C, PREFILL), (CTRL_C, TOOL)),
    ((TERM_STOP, WINDOW), (TERM, FINISH)),
    ((UNTIL, COMPACTION),),
    ((TERM, GROWTH),),
)


TALKS = Workload(
    seed=0, prompts=((1, 2, 3), (4,), (5, 6)), n=2, max_new_tokens=(28, 28, 20),
    is_answered=True, tool_s=0.001,
)  # fmt: skip

# The last completion is alone for a while.
TAIL = Workload(
    seed=0, prompts=((1,), (2,), (3,), (4,), (5,)), n=1,
    max_new_tokens=(8, 8, 8, 8, 44), stops=(),
)  # fmt: skip


def chain_of(
    seed: int, interrupts: Sequence[tuple[str, str]], ways: Sequence[Way] = WAYS
) -> Chain:
    """Return a chain whose lives end so, and one more."""
    is_tail = {moment for _, moment in interrupts} <= {COMPACTION, GROWTH}
    way = itertools.cycle(ways)
    lives = [
        Life(
            number=number,
            seed=number,
            way=next(way),
            rounds=1,
            every_s=0.0,
            goes_on=number % 2 == 0,
            interrupt=None if how is None else Interrupt(*how, is_before=False),
        )
        for number, how in enumerate([*interrupts, None])
    ]
    workload = dataclasses.replace(TAIL if is_tail else TALKS, seed=seed)
    return Chain(seed, workload, tuple(lives))


def run_chains(chains: Sequence[Chain], folder: Path) -> collections.Counter[Any]:
    outcomes = list(killed.Runner(folder).run(chains))
    assert [killed.told_of(o) for o in outcomes if o.problem is not None] == []
    totals: collections.Counter[Any] = collections.Counter()
    for outcome in outcomes:
        totals.update(outcome.counts)
    print(totals)
    return totals


@pytest.mark.slow
def test_every_signal_loses_nothing(tmp_path: Path) -> None:
    chains = [chain_of(seed, how) for seed, how in enumerate(CHAINS)]
    totals = run_chains(chains, tmp_path)
    for how in itertools.chain(*CHAINS):
        assert totals[how] >= 1, how
    assert totals["tokens of earlier lives"] > 0 < totals["resumed from a file"]


@pytest.mark.long
def test_lives_on_meshes(tmp_path: Path) -> None:
    totals = run_chains([chain_of(7, CHAINS[1], MESHES)], tmp_path)
    assert totals["2x2"] > 0 < totals["4x2"]


def test_chains_are_drawn_of_all_kinds() -> None:
    chains = [drawn(seed) for seed in range(300)]
    assert chains[7] == drawn(7)
    lives = [life for chain in chains for life in chain.lives]
    met = {(i.kind, i.moment) for life in lives if (i := life.interrupt) is not None}
    assert met >= set(itertools.product(KINDS, killed.MOMENTS))
    assert all(life.interrupt is None for life in (c.lives[-1] for c in chains))
    for chain in chains:
        for before, after in itertools.pairwise(chain.lives):
            assert before.way != after.way and before.interrupt is not None


# -- the checker


def kept(count: int, reason: str = "unfinished", version: int = 0) -> Kept:
    """Return the first tokens of one completion, of which the third was appended."""
    mask = np.arange(count) != 2
    return Kept(
        tokens=np.arange(1, count + 1, dtype=np.int32),
        logprobs=np.where(mask, -np.arange(count) / 8, 0).astype(np.float32),
        mask=mask,
        versions=np.where(mask, version, -1).astype(np.int32),
        reason=reason,
    )


def survived(is_exact: bool = True) -> Survival:
    """Return what is known of two completions after a life, the first one whole."""
    found = Survival([kept(5, "stop"), kept(6, "length")], is_exact)
    found.hold([kept(5, "stop"), kept(3)], 0)
    return found


def longer(count: int, reason: str) -> Kept:
    """Return the second completion after a second life."""
    now = kept(count, reason, version=1)
    versions = np.concatenate([kept(3).versions, now.versions[3:]])
    return dataclasses.replace(now, versions=versions)


def test_what_survives_is_held() -> None:
    found = survived()
    assert (found.num_kept, found.is_over) == (8, False)
    found.hold([kept(5, "stop"), longer(6, "length")], 1)
    assert found.is_same() and found.worst == 0


def changed(one: Kept, name: str, place: int, value: Any) -> Kept:
    values = getattr(one, name).copy()
    values[place] = value
    return dataclasses.replace(one, **{name: values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (kept(4), b), "completion 0: 4 tokens are left of 5"),
        (lambda a, b: (kept(5), b), "had ended by stop, and goes on"),
        (lambda a, b: (kept(5, "length"), b), "had ended by stop, and goes on"),
        (lambda a, b: (changed(a, "tokens", 0, 7), b), "tokens were"),
        (lambda a, b: (changed(a, "logprobs", 1, -0.1250001), b), "logprobs were"),
        (lambda a, b: (changed(a, "versions", 0, 1), b), "versions were"),
        (lambda a, b: (a, changed(b, "versions", 1, 1)), "versions were"),
        (lambda a, b: (a, changed(b, "versions", 4, 0)), "of which 3 are old"),
        (lambda a, b: (a, changed(b, "tokens", 5, 9)), "completion 1: .*, not "),
        (lambda a, b: (a, changed(b, "mask", 4, False)), "completion 1: "),
        (lambda a, b: (a, longer(5, "stop")), "ended by stop at 5"),
        (lambda a, b: (a, longer(7, "length")), "completion 1: .*, not "),
        (lambda a, b: (a, changed(b, "logprobs", 5, -0.6251)), "log-probabilities .*"),
    ],
)  # fmt: skip
def test_a_difference_is_found(
    change: Callable[[Kept, Kept], tuple[Kept, Kept]], message: str
) -> None:
    now = change(kept(5, "stop"), longer(6, "length"))
    with pytest.raises(Difference, match=message):
        survived().hold(now, 1)


def test_in_float32_what_differs_is_told_apart() -> None:
    """Ties are proven elsewhere; log-probabilities count as far as tokens agree."""
    found = survived(is_exact=False)
    other = changed(longer(6, "length"), "tokens", 4, 9)
    found.hold([kept(5, "stop"), changed(other, "logprobs", 5, -9)], 1)
    assert not found.is_same() and found.worst == 0
    with pytest.raises(Difference, match="unfinished at the end"):
        survived().is_same()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([{"finished": 1, "tokens": [1]}] * 2, "finished twice"),
        ([{"finished": 0, "tokens": [1, 2]}], "was over, and is told of"),
        ([{"asked": 0, "tokens": [1, 2, 3, 4, 5]}], "is asked about behind"),
        ([{"asked": 1, "tokens": [1, 2]}], "is asked about behind"),
        ([{"finished": 1, "tokens": [1, 2, 3, 4]}], "was told of as"),
        ([], r"told of \[\] as finished, not of \[1\]"),
    ],
)
def test_who_is_told_twice_or_never_is_found(
    told: list[dict[str, Any]], message: str
) -> None:
    was = [kept(5, "stop"), kept(3)]
    now = [kept(5, "stop"), longer(6, "length")]
    right = [
        {"asked": 1, "tokens": [1, 2, 3, 4]},
        {"finished": 1, "tokens": now[1].tokens.tolist()},
    ]
    survival.hold_told(right, was, now, was, is_whole=True)
    # A journal tells again of what it holds.
    again = [{"finished": 0, "tokens": now[0].tokens.tolist()}, *right]
    survival.hold_told(again, was, now, survival.nothing(2), is_whole=True)
    with pytest.raises(Difference, match=message):
        survival.hold_told(told, was, now, was, is_whole=True)


def test_counts_and_journals_are_held(tmp_path: Path) -> None:
    was, now = [kept(5, "stop"), kept(3)], [kept(5, "stop"), longer(6, "length")]
    survival.hold_counts({"resumed": 8, "sampled": 3}, was, now, 1)
    for ended in ({"resumed": 3, "sampled": 3}, {"resumed": 8, "sampled": 8}):
        with pytest.raises(Difference, match=r"tokens (resumed|sampled)"):
            survival.hold_counts(ended, was, now, 1)
    new = now[1]
    piece = Piece(1, 3, 1, Finish.LENGTH, new.tokens[3:], new.logprobs[3:])
    path = tmp_path / "a.journal"
    assert survival.of_journal(path, was) == was
    path.write_bytes(MAGIC + record(REQUEST, b"{}") + piece.to_bytes())
    noted = survival.of_journal(path, was)
    survival.hold_noted(noted, now)
    with pytest.raises(Difference, match="completion 1: the journal has"):
        survival.hold_noted(was, now)


def test_a_difference_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_all(lives: int, seed: int, **named: Any) -> list[killed.Outcome]:
        counts = collections.Counter(
            {"chains": 1, "lives": 4, "interrupts": 1, ("Ctrl-C", "tool"): 1}
        )
        problems = [None, "Difference: lost"]
        return [
            killed.Outcome(drawn(seed + i), counts, 1e-7, problem)
            for i, problem in enumerate(problems)
        ]

    monkeypatch.setattr(killed, "run_all", run_all)
    with pytest.raises(SystemExit, match=r"1 chains differ, seeds \[4\]"):
        killed.main(killed.Args(seed=3, out=tmp_path))
    found = json.loads((tmp_path / "killed.json").read_text())
    assert records.problems(found) == []
    (difference,) = found["differences"]
    assert difference["chain"]["seed"] == 4
    header, rows = killed.rows_of(found["points"])
    (tool,) = [row for row in rows if row[0] == "tool"]
    assert dict(zip(header, tool, strict=True))["Ctrl-C"] == 2
    assert rows[-1][-1] == 2 and "Ctrl-C" in capsys.readouterr().out
    assert "8 processes" in killed.summary(found)
