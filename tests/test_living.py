"""Admissions, finishes, turns, interrupts, resumes and evictions in any order.

Hypothesis decides, event by event, what becomes of a life of rollouts
(`benchmarks/lib/living.py`), and makes what fails as short as it can. Everything that
is seen is held to a reference that samples each sequence alone, token by token.

    python -m benchmarks.living    # a million steps

The life runs in a thread of its own and stops at every point where something may
happen, until a rule of the machine says what. Programs are compiled without XLA's
optimizer; they are shared by all lives.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import queue
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from benchmarks import living as random_lives
from benchmarks.lib import events, living, records
from benchmarks.lib.known import TOOL, VOCAB_SIZE, answer_of

pytestmark = pytest.mark.usefixtures("unoptimized_module")

BETWEEN, WINDOW, WAITING = "between", "window", "waiting"


class Threaded:
    """A life in a thread, which waits at every point for what happens there.

    Attributes:
      point: where it waits; None when it has ended.
    """

    def __init__(self) -> None:
        self.point: events.Point | None = None
        self._points: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self._folder = tempfile.TemporaryDirectory(prefix="er_jax_living_")
        self.life = living.Life(self._decide, Path(self._folder.name))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def _run(self) -> None:
        try:
            self.life.live()
        except BaseException as error:
            self._points.put(error)
        else:
            self._points.put(None)

    def _decide(self, point: events.Point) -> events.Event:
        self._points.put(point)
        return self._events.get()

    def _wait(self) -> None:
        found = self._points.get()
        self.point = found if isinstance(found, events.Point) else None
        if isinstance(found, BaseException):
            raise found

    def do(self, event: events.Event) -> None:
        """Have something happen, and wait for the next point."""
        self._events.put(event)
        self._wait()

    def close(self) -> None:
        """End the life, and wait for its thread."""
        if self.point is not None:
            self.do(events.End())
        self._thread.join()
        self._folder.cleanup()


def at(*kinds: str, needs: str | None = None) -> Any:
    """Return a precondition: the life is at one of these points, and may do that."""

    def holds(machine: LivingMachine) -> bool:
        point = machine.threaded.point
        if point is None or point.kind not in kinds:
            return False
        return needs is None or bool(getattr(point, needs))

    return precondition(holds)


INDEX = st.integers(0, 23)
PROMPT = st.integers(0, events.NUM_PROMPTS - 1)
NUMBERS = st.tuples(*[st.integers(0, VOCAB_SIZE - 1)] * 3)
WINDOWS = st.builds(events.Window, INDEX, st.sampled_from((1, 1, 2, 3)))
BREAKS = [events.Break(*how) for how in itertools.product((False, True), repeat=2)]
STYLES = st.builds(
    events.Style,
    slots=st.sampled_from(events.SLOTS),
    gammas=st.sampled_from((1, 0)),
    draft=st.integers(0, events.NUM_PARAMS - 1),
    is_stoppable=st.booleans(),
    finished=st.sampled_from((None, None, None, 1, 3)),
    groups=st.sampled_from((None, None, None, 1, 2)),
    tokens=st.sampled_from((None, None, None, 5, 15)),
    from_file=st.sampled_from((False, False, False, True)),
    is_noted=st.booleans(),
)
REQUESTS = st.builds(
    events.Begin,
    prompts=st.lists(PROMPT, min_size=1, max_size=3).map(tuple),
    n=st.sampled_from((2, 1)),
    key=st.integers(0, events.NUM_KEYS - 1),
    temperature=st.sampled_from((0, 1, 2)),
    stops=st.sampled_from((0, 1, 2)),
    limit=st.integers(2, events.MOST_NEW).map(lambda x: events.MOST_NEW + 2 - x),
    is_answered=st.booleans(),
    turn_tokens=st.sampled_from((None, 2, 4)),
    max_turns=st.sampled_from((None, None, 1, 3)),
    carried=st.sampled_from((0, 1, 2)),
    has_journal=st.booleans(),
    style=STYLES,
)
CHANGES = st.one_of(
    st.builds(events.Learn, st.integers(0, events.NUM_PARAMS - 1)),
    st.builds(events.Share, st.sampled_from((*events.PROMPT_BYTES[::-1], None))),
)


class LivingMachine(RuleBasedStateMachine):
    """What may happen to a life, wherever it is."""

    totals: collections.Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.threaded = Threaded()

    def teardown(self) -> None:
        """End the life."""
        with contextlib.suppress(Exception):
            self.threaded.close()
        self.totals.update(self.threaded.life.counts)

    @at(WINDOW)
    @rule(event=WINDOWS)
    def a_window_runs(self, event: events.Event) -> None:
        self.threaded.do(event)

    @at(WINDOW, WAITING, needs="rooms")
    @rule(turn=INDEX, numbers=NUMBERS)
    def a_turn_is_answered(self, turn: int, numbers: tuple[int, ...]) -> None:
        assert self.threaded.point is not None
        rooms = self.threaded.point.rooms
        turn %= len(rooms)
        self.threaded.do(events.Give(turn, answer_of(numbers, rooms[turn])))

    @at(WINDOW, WAITING, needs="rooms")
    @rule(turn=INDEX, answer=st.sampled_from((None, None, TOOL)))
    def a_turn_is_not_answered(self, turn: int, answer: str | None) -> None:
        self.threaded.do(events.Give(turn, answer))

    @at(WINDOW, WAITING, needs="can_halt")
    @rule()
    def the_call_is_told_to_end(self) -> None:
        self.threaded.do(events.Halt())

    @at(WINDOW)
    @rule(window=WINDOWS, broken=st.sampled_from((None, None, None, *BREAKS)))
    def a_window_runs_or_the_call_breaks(
        self, window: events.Event, broken: events.Event | None
    ) -> None:
        self.threaded.do(broken or window)

    @at(WAITING)
    @rule(broken=st.sampled_from((None, None, None, *BREAKS)))
    def nothing_happens_or_the_call_breaks(self, broken: events.Event | None) -> None:
        self.threaded.do(broken or events.Wait())

    @at(BETWEEN)
    @rule(request=REQUESTS)
    def a_request_begins(self, request: events.Begin) -> None:
        self.threaded.do(request)

    @at(BETWEEN, needs="can_go_on")
    @rule(
        raised=st.sampled_from((0, 0, 0, 2)),
        is_answered=st.sampled_from((None, None, True, False)),
        has_journal=st.sampled_from((None, None, True, False)),
        style=STYLES,
    )
    def the_request_goes_on(self, **named: Any) -> None:
        self.threaded.do(events.GoOn(**named))

    @at(BETWEEN, needs="can_change")
    @rule(event=CHANGES)
    def something_changes_between_calls(self, event: events.Event) -> None:
        self.threaded.do(event)

    @at(BETWEEN, needs="has_journal")
    @rule(share=st.floats(0, 1))
    def the_journal_is_torn(self, share: float) -> None:
        self.threaded.do(events.Tear(share))


def run_machine(
    examples: int, steps: int, *, phases: Sequence[Phase] = tuple(Phase)
) -> collections.Counter[str]:
    """Run lives, always the same ones; return what happened in all of them.

    Args:
      examples: how many. steps: events of each, about.
      phases: of hypothesis; without `Phase.shrink` a failure is found sooner.
    """
    totals: collections.Counter[str] = collections.Counter()
    machine = type("Machine", (LivingMachine,), {"totals": totals})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=phases,
            derandomize=True,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return totals


def test_some_hundred_events() -> None:
    totals = run_machine(10, 40, phases=[Phase.generate])
    print(totals)
    assert totals["steps"] >= 300


@pytest.mark.slow
def test_lives_drawn_at_random() -> None:
    """As the long run does: longer than those above, and with more turns."""
    outcomes = random_lives.run_all(1000, seed=9)
    assert [random_lives.told(o) for o in outcomes if o.problem is not None] == []
    again = random_lives.run(10)
    assert again.counts == outcomes[1].counts, "a seed says all"


def test_a_difference_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(seed: int) -> random_lives.Outcome:
        counts = collections.Counter(steps=500, lives=1, differences=int(seed == 4))
        problem = "Difference: lost" if seed == 4 else None
        return random_lives.Outcome(seed, counts, problem, [events.Wait()])

    monkeypatch.setattr(random_lives, "run", run)
    with pytest.raises(SystemExit, match=r"1 lives differ, seeds \[4\]"):
        random_lives.main(random_lives.Args(steps=1200, seed=3, out=tmp_path))
    assert "--seed 4 --steps 1" in capsys.readouterr().out
    record = json.loads((tmp_path / "living.json").read_text())
    assert records.problems(record) == []
    assert record["differences"] == [
        {"seed": 4, "problem": "Difference: lost", "events": ["Wait()"]}
    ]
    assert ("steps", 1500) in random_lives.rows_of(record["points"])[1]
    assert "Seeds 3 to 5: 1500 steps" in random_lives.summary(record)


@pytest.mark.slow
def test_ten_thousand_events() -> None:
    totals = run_machine(150, 100)
    print(totals)
    assert totals["steps"] >= 10_000
    # All that a life may hold did happen.
    never = [name for name in random_lives.ROWS.values() if not totals[name]]
    assert never == ["lives", "differences"]
