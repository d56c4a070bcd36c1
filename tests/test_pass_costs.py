"""Surfaces and roofline on readings that are known to the last digit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from er_jax.costs.passes import Kind, PassCosts, Reading, Surface
from er_jax.costs.record import save_record
from er_jax.costs.roofline import Roofline
from er_jax.types import Program

ROWS, LENGTHS = (1, 4, 16, 64), (256, 1024, 4096)

ROOFLINE = Roofline(
    target_weights_s=9e-3,
    draft_weights_s=4e-3,
    cache_s=2e-8,
    dense_s=6e-5,
    attention_s=2e-9,
    target_overhead_s=3e-5,
    draft_overhead_s=6e-5,
    verify_overhead_s=1.5e-4,
)


def plane(rows: int, length: int) -> float:
    """Weights once, and every entry of the cache once: what a surface can express."""
    return 5e-3 + 1e-5 * rows + 2e-8 * rows * length


def readings(seconds: dict[tuple[int, int], float]) -> list[Reading]:
    return [Reading("target", *cell, 0, value) for cell, value in seconds.items()]


def exact() -> dict[tuple[int, int], float]:
    return {cell: plane(*cell) for cell in itertools.product(ROWS, LENGTHS)}


def test_a_surface_goes_through_what_it_can_express() -> None:
    surface = Surface.fit(readings(exact()))
    for rows, length in itertools.product(
        (1, 2, 5, 16, 40, 64), (256, 300, 2000, 4096)
    ):
        assert surface.seconds(rows, length) == pytest.approx(plane(rows, length))


def test_half_of_the_cells_say_what_the_others_are() -> None:
    half = {cell: value for i, (cell, value) in enumerate(exact().items()) if i % 2}
    surface = Surface.fit(readings(half))
    for cell, value in exact().items():
        assert surface.seconds(*cell) == pytest.approx(value, rel=1e-3)


def test_a_wild_reading_changes_nothing() -> None:
    wild = exact()
    wild[16, 1024] *= 3
    surface = Surface.fit(readings(wild))
    for cell, value in exact().items():
        assert surface.seconds(*cell) == pytest.approx(value, rel=1e-3)


def test_readings_in_doubt_count_less() -> None:
    sure = [Reading("target", 1, 256, 0, 1.0), Reading("target", 1, 256, 0, 1.0)]
    doubt = [Reading("target", 1, 256, 0, 2.0, 0.1) for _ in range(5)]
    assert Surface.fit(sure + doubt).seconds(1, 256) == pytest.approx(1.0)
    trusted = [reading._replace(weight=1.0) for reading in doubt]
    assert Surface.fit(sure + trusted).seconds(1, 256) == pytest.approx(2.0)


@pytest.mark.parametrize("falling", [0.0, 1.0])
def test_no_surface_falls_in_rows_or_length(falling: float) -> None:
    """Not where the readings are noise, and not where they do fall."""
    random = np.random.default_rng(0)
    noisy = {
        cell: 1e-3 * random.uniform(1, 2) / (cell[0] * cell[1]) ** falling
        for cell in exact()
    }
    surface = Surface.fit(readings(noisy))
    grid = [
        [surface.seconds(rows, length) for length in range(128, 8193, 448)]
        for rows in (1, 2, 3, 4, 9, 16, 31, 64, 100, 200)
    ]
    assert (np.diff(grid, axis=0) >= -1e-12).all()
    assert (np.diff(grid[:8], axis=1) >= -1e-12).all()


def test_outside_of_what_was_measured() -> None:
    flat = {(2, 100): 1.0, (4, 100): 1.0, (8, 100): 3.0, (2, 200): 1.5, (4, 200): 2.0}
    surface = Surface.fit(readings({**flat, (8, 200): 5.0}))
    assert surface.seconds(1, 100) == pytest.approx(surface.seconds(2, 100))
    # From 4 to 8 rows it rose faster than the rows: no faster than they, from there on.
    assert surface.seconds(16, 100) == pytest.approx(6.0)
    assert surface.seconds(2, 400) == pytest.approx(2.5)
    assert surface.seconds(8, 50) == pytest.approx(2.0)
    assert surface.seconds(8, 0) == pytest.approx(1.0)
    assert surface.seconds(8, 1) >= 0.01 * surface.seconds(8, 100)


def test_one_reading_is_a_surface() -> None:
    surface = Surface.fit(readings({(4, 256): 2.0}))
    assert surface.seconds(4, 256) == pytest.approx(2.0)
    assert surface.seconds(16, 256) == pytest.approx(4.0)
    assert surface.seconds(4, 512) == pytest.approx(2.0 * 2**0.3)


def test_no_pass_is_for_nothing() -> None:
    """Rows that were measured at one length only, the other of which is another's."""
    readings = [Reading("target", 1, 1024, 0, 8.0), Reading("target", 4, 256, 0, 6.0)]
    surface = Surface.fit(readings)
    assert surface.seconds(1, 1024) == pytest.approx(8)
    assert surface.seconds(4, 256) == pytest.approx(6)
    for rows, length in itertools.product((1, 2, 4, 8), (1, 256, 512, 1024)):
        assert surface.seconds(rows, length) >= 8 * length / 1024 * (1 - 1e-9)


def passes(
    roofline: Roofline = ROOFLINE, gammas: tuple[int, ...] = (3, 7)
) -> PassCosts:
    return PassCosts(roofline_readings(roofline, gammas))


def roofline_readings(
    roofline: Roofline, gammas: tuple[int, ...] = (3, 7)
) -> list[Reading]:
    found = []
    for cell in itertools.product((1, 2, 4, 8, 16, 32, 64), LENGTHS):
        found.append(
            Reading("target", *cell, 0, roofline.pass_seconds("target", *cell))
        )
        for gamma in gammas:
            draft = roofline.pass_seconds("draft", *cell, gamma)
            verify = roofline.pass_seconds("verify", *cell, gamma)
            found.append(Reading("draft", *cell, gamma, draft))
            found.append(Reading("verify", *cell, gamma, verify))
    return found


def test_a_round_is_its_drafts_and_a_verification() -> None:
    costs = passes()
    at = (8, 1024)
    assert costs.round_seconds(Program(*at, 0)) == costs.pass_seconds("target", *at)
    wanted = 7 * ROOFLINE.pass_seconds("draft", *at)
    wanted += ROOFLINE.pass_seconds("verify", *at, 7)
    assert costs.round_seconds(Program(*at, 7)) == pytest.approx(wanted, rel=1e-3)
    assert ROOFLINE.round_seconds(Program(*at, 7)) == pytest.approx(wanted)
    assert costs.gammas("verify") == [3, 7]


def test_gammas_between_and_beyond_the_measured() -> None:
    costs, at = passes(), (32, 1024)
    target, three, seven = (
        costs.pass_seconds("target", *at),
        costs.pass_seconds("verify", *at, 3),
        costs.pass_seconds("verify", *at, 7),
    )
    assert target < three < seven
    assert costs.pass_seconds("verify", *at, 5) == pytest.approx((three + seven) / 2)
    between = target + (three - target) / 3
    assert costs.pass_seconds("verify", *at, 1) == pytest.approx(between)
    beyond = seven + 2 * (seven - three) / 4
    assert costs.pass_seconds("verify", *at, 9) == pytest.approx(beyond)
    assert costs.pass_seconds("draft", *at, 20) == costs.pass_seconds("draft", *at, 7)


def test_more_drafts_are_never_verified_for_less() -> None:
    """Between gammas that were measured; those keep their own readings."""
    wrong = [Reading("verify", 1, 256, 4, 0.5), Reading("verify", 1, 256, 8, 3.0)]
    costs = PassCosts([Reading("target", 1, 256, 0, 1.0), *wrong])
    assert costs.pass_seconds("verify", 1, 256, 4) == pytest.approx(0.5)
    assert costs.pass_seconds("verify", 1, 256, 2) == pytest.approx(1.0)


def test_what_was_not_measured_is_named() -> None:
    target = [Reading("target", 1, 256, 0, 1.0)]
    with pytest.raises(ValueError, match="no draft was measured"):
        PassCosts(target).pass_seconds("draft", 1, 256, 4)
    with pytest.raises(ValueError, match="no target pass"):
        PassCosts([Reading("draft", 1, 256, 4, 1.0)])


def test_the_roofline_equations() -> None:
    simple = Roofline(4.0, 2.0, 0.01, 0.5, 0.001, 0.1, 0.2, 0.3)
    # Bound by bytes, 4 + .01 x 2 x 10; then by arithmetic, n x 20 x (.5 + .001 x 10).
    assert simple.pass_seconds("target", 2, 10) == pytest.approx(4.2 + 0.2)
    assert simple.pass_seconds("draft", 2, 10) == pytest.approx(2.2 + 0.4)
    assert simple.pass_seconds("verify", 2, 10, 1) == pytest.approx(4.2 + 0.6)
    assert simple.pass_seconds("verify", 20, 10, 3) == pytest.approx(4 * 20 * 0.51 + 6)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_roofline_is_found_from_its_passes(scale: float) -> None:
    """On a device fifty times as slow as well: no bound is of any one device."""
    values = [scale * value for value in dataclasses.astuple(ROOFLINE)]
    roofline = Roofline(*values)
    found = Roofline.fit(roofline_readings(roofline))
    for reading in roofline_readings(roofline):
        kind, rows, length, gamma, seconds, _ = reading
        predicted = found.pass_seconds(kind, rows, length, gamma)
        assert predicted == pytest.approx(seconds, rel=0.02)


def as_rounds() -> list[Reading]:
    """What windows can measure: steps, and rounds as a whole."""
    found = []
    for cell in itertools.product((1, 2, 4, 8, 16, 32, 64), LENGTHS):
        for gamma in (0, 2, 4, 8):
            seconds = ROOFLINE.round_seconds(Program(*cell, gamma))
            kind: Kind = "round" if gamma else "target"
            found.append(Reading(kind, *cell, gamma, seconds))
    return found


def test_rounds_may_be_measured_as_a_whole() -> None:
    costs = PassCosts(as_rounds())
    for program in (Program(2, 512, 4), Program(32, 2048, 8), Program(64, 256, 0)):
        wanted = ROOFLINE.round_seconds(program)
        assert costs.round_seconds(program) == pytest.approx(wanted, rel=0.05)
    one, two, four, six, eight, ten = (
        costs.round_seconds(Program(4, 512, gamma)) for gamma in (1, 2, 4, 6, 8, 10)
    )
    assert six == pytest.approx((four + eight) / 2)
    assert ten == pytest.approx(eight + (eight - four) / 2)
    assert one == pytest.approx(two - (four - two) / 2)
    assert costs.round_seconds(Program(4, 512, 0)) < one < two


def test_rounds_of_one_gamma_are_on_the_line_to_a_step() -> None:
    costs = PassCosts([r for r in as_rounds() if r.gamma in (0, 4)])
    none, two, four, eight = (
        costs.round_seconds(Program(4, 512, gamma)) for gamma in (0, 2, 4, 8)
    )
    assert two == pytest.approx((none + four) / 2)
    assert eight == pytest.approx(four + (four - none))


def test_no_round_is_cheaper_than_a_step() -> None:
    """Whatever the noise of two readings says of a shorter draft."""
    costs = PassCosts(
        [
            Reading("target", 4, 512, 0, 1.0),
            Reading("round", 4, 512, 4, 1.5),
            Reading("round", 4, 512, 8, 9.0),
        ]
    )
    assert costs.round_seconds(Program(4, 512, 2)) == pytest.approx(1.0)


def test_a_roofline_is_found_from_rounds() -> None:
    found = Roofline.fit(as_rounds())
    for reading in as_rounds():
        predicted = found.round_seconds(Program(*reading[1:4]))
        assert predicted == pytest.approx(reading.seconds, rel=0.03)
        assert predicted == found.pass_seconds(*reading[:4])


ABOUT = {"device": "A", "policy": "p"}


def test_a_roofline_is_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "made" / "costs.json"
    ROOFLINE.save(path, ABOUT)
    for about in (None, {}, ABOUT, {"device": "A"}):
        assert Roofline.load(path, about) == ROOFLINE
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_costs_of_another_device_or_policy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    ROOFLINE.save(path, ABOUT)
    with pytest.raises(ValueError, match="measured with device 'A', and this is 'B'"):
        Roofline.load(path, {**ABOUT, "device": "B"})
    with pytest.raises(ValueError, match="measured with jax None, and this is '1'"):
        Roofline.load(path, {"jax": "1"})
    save_record(path, "latency table", ABOUT, {})
    with pytest.raises(ValueError, match="holds latency table, not roofline"):
        Roofline.load(path)
    for text in ("", "[]", "{}", "nonsense"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no costs; measure them again"):
            Roofline.load(path)
