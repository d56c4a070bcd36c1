"""The latency table on readings worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from er_jax.costs.passes import PassCosts, Reading
from er_jax.costs.record import save_record
from er_jax.costs.roofline import Roofline
from er_jax.costs.table import LatencyTable
from er_jax.request import bucket_of, row_buckets
from er_jax.types import Program
from tests.test_pass_costs import ROOFLINE

AR = Program(rows=4, cache_length=128, gamma=0)
SPECULATIVE = Program(rows=4, cache_length=128, gamma=4)


def known(seconds: dict[Any, float]) -> LatencyTable:
    return LatencyTable({Program(*name): value for name, value in seconds.items()})


def test_the_first_reading_is_all_there_is() -> None:
    table = LatencyTable()
    assert table.round_seconds(AR) is None
    table.observe(AR, 0.6, 3)
    assert table.seconds[AR] == pytest.approx(0.2)
    # Three rounds of fifty: it may be nearly a fifth faster.
    assert table.round_seconds(AR) == pytest.approx(0.2 * (1 - 0.2 * 47 / 50))
    table.observe(AR, 47 * 0.2, 47)
    assert table.round_seconds(AR) == pytest.approx(0.2)


def test_a_window_without_rounds_says_nothing() -> None:
    table = LatencyTable()
    table.observe(AR, 0.6, 0)
    assert table.seconds == {}


def test_readings_are_averaged_over_rounds() -> None:
    """1 - exp(-seconds) of the way, however many rounds and windows those are."""
    for round_s in (1e-3, 1e-2):
        rounds = round(0.5 / round_s)
        table, parts = known({AR: round_s}), known({AR: round_s})
        table.observe(AR, rounds * round_s * 1.1, rounds)
        expected = round_s * (1.1 - 0.1 * math.exp(-0.5))
        assert table.round_seconds(AR) == pytest.approx(expected)
        for part in (rounds // 5, rounds - rounds // 5):
            parts.observe(AR, part * round_s * 1.1, part)
        assert parts.round_seconds(AR) == pytest.approx(expected, rel=1e-3)


def test_a_slowed_machine_is_followed_within_a_few_windows() -> None:
    """80 % of the way after five windows of a quarter of a second, of any rounds."""
    for round_s in (1e-3, 2e-2, 0.125):
        table = known({AR: round_s})
        for _ in range(5):
            rounds = max(round(0.25 / round_s), 1)
            table.observe(AR, rounds * 2 * round_s, rounds)
        assert 1.8 * round_s < (table.round_seconds(AR) or 0) < 2.1 * round_s


def test_the_first_readings_are_averaged_over_their_rounds() -> None:
    table = LatencyTable()
    for rounds, round_s in ((10, 1e-3), (30, 1.4e-3)):
        table.observe(AR, rounds * round_s, rounds)
    assert table.seconds[AR] == pytest.approx((10 * 1e-3 + 30 * 1.4e-3) / 40)
    assert table.rounds[AR] == 40


def test_few_rounds_count_for_little_beside_what_others_say() -> None:
    """Between the reading and the prediction, less a part for the uncertainty."""
    table = known({(4, 256, 0): 2**0.3})
    assert table.round_seconds(AR) == pytest.approx(1.0)
    for rounds, uncertainty in ((10, 0.8), (30, 0.2), (10, 0.0), (100, 0.0)):
        table.observe(AR, rounds * 3.0, rounds)
        expected = uncertainty * 1.0 + (1 - uncertainty) * 3.0
        expected *= 1 - 0.2 * uncertainty
        assert table.round_seconds(AR) == pytest.approx(expected)


def test_a_round_of_many_drafts_tells_as_much_as_many_steps() -> None:
    table, spec = known({AR: 1.0}), Program(4, 128, 4)
    table.observe(spec, 4 * 3.0, 4)  # 20 positions of 50; nothing else drafted
    assert table.round_seconds(spec) == pytest.approx(3.0 * (1 - 0.2 * 0.6))
    table.observe(spec, 6 * 3.0, 6)
    assert table.round_seconds(spec) == pytest.approx(3.0)


def test_a_reading_below_the_prediction_is_believed() -> None:
    """Whatever else runs on a machine only ever adds time."""
    table = known({(4, 256, 0): 2**0.3})
    table.observe(AR, 10 * 0.5, 10)
    assert table.round_seconds(AR) == pytest.approx(0.5 * (1 - 0.2 * 0.8))


def test_a_program_that_began_badly_gets_another_chance() -> None:
    """Its own first reading does not enter into what the others say of it."""
    for program in (Program(4, 64, 0), Program(4, 64, 2)):
        table = known({AR: 1.0, Program(4, 128, 2): 1.5})
        promised = table.round_seconds(program)
        assert promised is not None
        rounds = 6 // (program.gamma + 1)
        table.observe(program, rounds * 4 * promised, rounds)
        # Of a reading four times as slow 6 parts in 50 count.
        slower = (0.88 * 1 + 0.12 * 4) * (1 - 0.2 * 0.88)
        assert table.round_seconds(program) == pytest.approx(slower * promised)


def test_a_stall_counts_at_most_twice_what_was_known() -> None:
    stalled, slow = known({AR: 1e-3}), known({AR: 1e-3})
    stalled.observe(AR, 20 * 1.0, 20)
    slow.observe(AR, 20 * 2e-3, 20)
    assert stalled.round_seconds(AR) == slow.round_seconds(AR)
    assert 1e-3 < stalled.seconds[AR] < 1.1e-3


def test_a_lasting_change_gets_through() -> None:
    for factor in (8.0, 1 / 8):
        table = known({AR: 1.0})
        for _ in range(30):
            table.observe(AR, 100 * factor, 100)
        assert table.round_seconds(AR) == pytest.approx(factor, rel=0.02)


def slowed(factor: float, num_windows: int) -> LatencyTable:
    """A table of two well known programs, and windows of one at another speed."""
    table = known({AR: 1e-2, SPECULATIVE: 3e-2})
    for _ in range(num_windows):
        table.observe(AR, 25 * factor * 1e-2, 25)
    return table


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_that_changes_changes_all_programs(factor: float) -> None:
    """Those that have not run since must not look fast, or slow, for that."""
    table = slowed(factor, 6)
    assert table.round_seconds(AR) == pytest.approx(1e-2 * factor, rel=0.1)
    assert table.round_seconds(SPECULATIVE) == pytest.approx(3e-2 * factor, rel=0.25)
    unknown = Program(4, 256, 0)
    before = known({AR: 1e-2, SPECULATIVE: 3e-2}).round_seconds(unknown)
    now = table.round_seconds(unknown)
    assert before and now and now / before == pytest.approx(factor, rel=0.25)
    # And back again.
    for _ in range(12):
        table.observe(AR, 25 * 1e-2, 25)
    assert table.round_seconds(AR) == pytest.approx(1e-2, rel=0.05)
    assert table.round_seconds(SPECULATIVE) == pytest.approx(3e-2, rel=0.2)


@pytest.mark.parametrize("factor", [1.2, 0.85])
def test_a_program_that_changes_a_little_is_alone_in_it(factor: float) -> None:
    table = slowed(factor, 20)
    assert table.round_seconds(AR) == pytest.approx(1e-2 * factor, rel=0.02)
    assert table.round_seconds(SPECULATIVE) == pytest.approx(3e-2)


def test_a_program_that_is_little_known_says_nothing_of_the_machine() -> None:
    table = known({SPECULATIVE: 3e-2})
    table.observe(AR, 5 * 1e-2, 5)
    table.observe(AR, 5 * 4e-2, 5)
    assert table.slowdown == 1.0
    assert table.round_seconds(SPECULATIVE) == 3e-2


def test_a_program_that_alone_became_slow_is_told_from_the_others() -> None:
    """Two programs by turns: what is no slowdown is the program's own in the end."""
    table = known({AR: 1e-2, SPECULATIVE: 3e-2})
    for _ in range(40):
        table.observe(AR, 25 * 2e-2, 25)
        table.observe(SPECULATIVE, 8 * 3e-2, 8)
    ar_s, speculative_s = map(table.round_seconds, (AR, SPECULATIVE))
    assert ar_s and speculative_s
    assert speculative_s / ar_s == pytest.approx(1.5, rel=0.15)


def test_rows_between_readings_are_on_a_power_law() -> None:
    table = known({(1, 128, 0): 1.0, (4, 128, 0): 2.0, (16, 128, 0): 8.0})
    for rows, seconds in ((1, 1.0), (2, 2**0.5), (4, 2.0), (8, 4.0), (16, 8.0)):
        assert table.round_seconds(Program(rows, 128, 0)) == pytest.approx(seconds)
    # Outside, the nearest law goes on.
    assert table.round_seconds(Program(64, 128, 0)) == pytest.approx(32.0)
    wide = known({(4, 128, 0): 2.0, (16, 128, 0): 4.0})
    assert wide.round_seconds(Program(1, 128, 0)) == pytest.approx(1.0)


def test_more_rows_are_predicted_neither_faster_nor_worse_than_proportional() -> None:
    """Whatever two noisy readings seem to say."""
    falling = known({(2, 128, 0): 3.0, (4, 128, 0): 2.0})
    assert falling.round_seconds(Program(8, 128, 0)) == pytest.approx(3.0)
    assert falling.round_seconds(Program(1, 128, 0)) == pytest.approx(3.0)
    steep = known({(2, 128, 0): 1.0, (4, 128, 0): 16.0})
    assert steep.round_seconds(Program(8, 128, 0)) == pytest.approx(4.0)
    assert steep.round_seconds(Program(1, 128, 0)) == pytest.approx(0.5)


def test_one_reading_predicts_all_sizes_of_its_gamma() -> None:
    table = known({AR: 1.0})
    seconds = [table.round_seconds(Program(rows, 128, 0)) for rows in (1, 4, 16)]
    assert seconds == pytest.approx([0.5, 1.0, 2.0])
    longer = table.round_seconds(Program(4, 256, 0))
    shorter = table.round_seconds(Program(4, 64, 0))
    assert longer == pytest.approx(2**0.3)
    assert shorter == pytest.approx(2**-0.3)


def test_readings_of_the_nearest_length_are_used() -> None:
    table = known({(2, 128, 0): 1.0, (4, 128, 0): 1.0, (2, 1024, 0): 9.0})
    assert table.round_seconds(Program(8, 128, 0)) == pytest.approx(1.0)
    assert table.round_seconds(Program(2, 2048, 0)) == pytest.approx(9 * 2**0.3)


def test_a_draft_costs_what_it_cost_elsewhere() -> None:
    """A step grows with the root of rows, so verifying n positions costs n ** .5.

    Four drafts should add 4 x .5 + 5 ** .5 - 1 steps and were measured to add .8; the
    same share of what they should add is predicted for other gammas and sizes.
    """
    table = known({(1, 128, 0): 10.0, (1, 128, 4): 18.0, (4, 128, 0): 20.0})
    share = 0.8 / (4 * 0.5 + 5**0.5 - 1)
    for rows, step in ((1, 10.0), (4, 20.0)):
        for gamma in (1, 2, 4, 8):
            seconds = step * (1 + share * (gamma * 0.5 + (gamma + 1) ** 0.5 - 1))
            found = table.round_seconds(Program(rows, 128, gamma))
            assert found == pytest.approx(seconds)


def test_verification_is_dear_where_steps_are_bound_by_arithmetic() -> None:
    """Bound by weights a step costs the same for any rows; else what its rows cost."""
    bound_by_weights = known({(1, 128, 0): 1, (64, 128, 0): 1, (1, 128, 4): 3})
    assert bound_by_weights.round_seconds(Program(64, 128, 4)) == pytest.approx(3.0)
    by_arithmetic = known({(8, 128, 0): 1, (64, 128, 0): 8, (8, 128, 4): 7})
    assert by_arithmetic.round_seconds(Program(64, 128, 4)) == pytest.approx(56.0)


def test_of_several_gammas_the_nearest_tells_most() -> None:
    table = known({(1, 128, 0): 10.0, (1, 128, 1): 11.0, (1, 128, 8): 90.0})

    def extra(gamma: int) -> float:
        return gamma * 0.5 + (gamma + 1) ** 0.5 - 1

    near_one, near_eight = (
        table.round_seconds(Program(1, 128, gamma)) for gamma in (2, 6)
    )
    assert near_one == pytest.approx(10 + 1 * extra(2) / extra(1))
    assert near_eight == pytest.approx(10 + 80 * extra(6) / extra(8))


def test_drafts_are_never_predicted_to_be_less_than_free() -> None:
    table = known({(1, 128, 0): 10.0, (1, 128, 4): 9.0})
    assert table.round_seconds(Program(1, 128, 2)) == pytest.approx(10.0)
    assert table.round_seconds(Program(1, 128, 4)) == 9.0  # but a reading stands


def test_speculation_alone_does_not_tell_what_a_step_costs() -> None:
    table = known({(1, 128, 4): 18.0})
    assert table.round_seconds(Program(1, 128, 0)) is None
    assert table.round_seconds(Program(1, 128, 2)) is None
    assert table.round_seconds(Program(4, 128, 4)) == pytest.approx(36.0)


def test_predictions_follow_what_is_observed() -> None:
    """They stand while a measured program wavers, not when it moves."""
    table, asked = known({AR: 1.0, SPECULATIVE: 3.0}), Program(8, 128, 2)
    before = table.round_seconds(asked)
    table.observe(SPECULATIVE, 10 * 3.03, 10)
    assert table.round_seconds(asked) == before
    for _ in range(20):
        table.observe(SPECULATIVE, 10 * 3.6, 10)
    fresh = LatencyTable(dict(table.seconds)).round_seconds(asked)
    assert before is not None and fresh is not None
    assert abs(fresh / before - 1) > 0.05
    assert table.round_seconds(asked) == pytest.approx(fresh, rel=0.02)


def test_predictions_grow_with_rows_length_and_gamma() -> None:
    table = known(
        {
            (1, 128, 0): 1.0,
            (8, 128, 0): 1.9,
            (32, 128, 0): 6.0,
            (1, 128, 4): 1.7,
            (8, 512, 4): 4.0,
        }
    )
    rows = [table.round_seconds(Program(n, 128, 0)) for n in (1, 2, 5, 8, 20, 32, 64)]
    lengths = [table.round_seconds(Program(5, n, 0)) for n in (64, 128, 300, 1024)]
    gammas = [table.round_seconds(Program(1, 128, n)) for n in (0, 1, 2, 4, 6, 9)]
    for line in (rows, lengths, gammas):
        values = [value for value in line if value is not None]
        assert len(values) == len(line)
        assert values == sorted(set(values))


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (5, (1, 2, 3, 4, 5)),
        (8, (1, 2, 3, 4, 6, 8)),
        (64, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)),
        (100, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_row_buckets(slots: int, sizes: tuple[int, ...]) -> None:
    assert row_buckets(slots) == sizes


def test_bucket_of() -> None:
    assert [bucket_of(n, (2, 4, 8)) for n in (1, 2, 3, 8)] == [2, 2, 4, 8]


ABOUT = {"device": "A", "policy": "p"}


def test_a_table_is_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    passes = PassCosts(
        [Reading("target", 1, 64, 0, 0.1), Reading("draft", 1, 64, 2, 1)]
    )
    table = known({AR: 1.0, SPECULATIVE: 3.0})
    table.passes = passes
    table.save(path, ABOUT)
    found = LatencyTable.load(path, ABOUT)
    assert found.seconds == table.seconds
    assert found.passes is not None
    assert found.passes.readings == passes.readings
    with pytest.raises(ValueError, match="measured with device 'A', and this is 'B'"):
        LatencyTable.load(path, {**ABOUT, "device": "B"})
    known({AR: 1.0}).save(path, ABOUT)
    assert LatencyTable.load(path).passes is None


def test_what_was_kept_is_believed_less_than_what_ran(tmp_path: Path) -> None:
    """Half the uncertainty of a program that never ran, whatever its gamma."""
    path = tmp_path / "costs.json"
    known({AR: 1e-3, SPECULATIVE: 3e-3}).save(path, ABOUT)
    table = LatencyTable.load(path)
    for program, seconds in ((AR, 1e-3), (SPECULATIVE, 3e-3)):
        assert table.round_seconds(program) == pytest.approx(0.9 * seconds)
    # A single window of this process outweighs it.
    table.observe(AR, 100 * 0.5e-3, 100)
    assert table.round_seconds(AR) == pytest.approx((25 * 1e-3 + 100 * 0.5e-3) / 125)


def test_news_are_a_program_or_twice_the_rounds(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    table = LatencyTable()
    assert not table.is_dirty
    table.observe(AR, 1.0, 10)
    assert table.is_dirty
    for kept in (table, None):
        table.save(path, ABOUT)
        table = kept or LatencyTable.load(path)
        assert not table.is_dirty
    rounds = sum(table.rounds.values())
    table.observe(AR, 1.0, rounds)
    assert not table.is_dirty
    table.observe(AR, 1.0, 1)
    assert table.is_dirty
    table.save(path, ABOUT)
    table.observe(SPECULATIVE, 1.0, 1)
    assert table.is_dirty


def test_shared_programs_are_priced_beside_the_same_apart() -> None:
    table = known({(8, 128, 0): 1.0, (8, 128, 4): 3.0})
    step, drafting = (Program(8, 128, gamma, shared_rows=True) for gamma in (0, 4))
    # A guess, until one ran: half.
    assert table.round_seconds(step) == pytest.approx(0.5)
    assert table.round_seconds(drafting) == pytest.approx(1.5)
    table.observe(step, 80.0, 100)
    assert table.round_seconds(step) == pytest.approx(0.8)
    assert table.round_seconds(drafting) == pytest.approx(2.4)
    # What joint programs take says nothing of the others.
    assert table.round_seconds(AR) == known({(8, 128, 0): 1.0}).round_seconds(AR)
    assert len(table.readings()) == 2
    assert LatencyTable().round_seconds(step) is None


def test_shared_programs_come_back_from_a_file(tmp_path: Path) -> None:
    table = known({AR: 1.0, AR._replace(shared_rows=True): 2.0})
    table.save(tmp_path / "table.json", {"device": "x"})
    assert LatencyTable.load(tmp_path / "table.json").seconds == table.seconds


@pytest.mark.parametrize(
    "values", [None, [], {}, {"extra": 1.0}, {"dense_s": math.nan}, {"dense_s": "1"}]
)
def test_a_damaged_roofline_is_refused(tmp_path: Path, values: Any) -> None:
    path = tmp_path / "roofline.json"
    ROOFLINE.save(path, ABOUT)
    if values:
        values = dataclasses.asdict(ROOFLINE) | values
    save_record(path, "roofline", ABOUT, values)
    with pytest.raises(ValueError, match=r"roofline.json is damaged: .* measure"):
        Roofline.load(path, ABOUT)


def test_readings_that_no_surface_fits_are_named() -> None:
    readings = [Reading("target", rows, 64, 0, float("1e-200")) for rows in (1, 2)]
    readings += [Reading("target", rows, 128, 0, 1e200) for rows in (1, 2)]
    with pytest.raises(ValueError, match="target at gamma 0 cannot be fitted"):
        PassCosts(readings)


def test_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    path, size = tmp_path / "costs.json", np.int64(4)
    program = Program(size, np.int32(128), np.int64(2))  # type: ignore[arg-type]
    table = LatencyTable({program: np.float32(0.5)})  # type: ignore[dict-item]
    table.save(path, ABOUT)
    assert LatencyTable.load(path, ABOUT).seconds == {Program(4, 128, 2): 0.5}
