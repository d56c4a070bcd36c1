"""Reading a contaminated sweep, and judging predictions against it."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from er_jax.costs.passes import Cell, PassCosts
from er_jax.costs.roofline import Roofline
from er_jax.tools.sweep import (
    DOUBTFUL_WEIGHT,
    halves,
    joined,
    judge,
    read_sweep,
    report,
)
from tests.test_pass_costs import ROOFLINE

BATCHES, LENGTHS, GAMMAS = (1, 2, 4, 8, 16, 32, 64), (256, 512, 1024, 2048), (3, 7)
NAMES = (
    "model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples"
).split(",")


def rows_of(roofline: Roofline = ROOFLINE) -> list[dict[str, Any]]:
    found = []
    kinds = [("target_decode", "target", 0)]
    kinds += [("drafter_decode", "draft", gamma) for gamma in GAMMAS]
    kinds += [("target_verify", "verify", gamma) for gamma in GAMMAS]
    for (mode, kind, gamma), batch, seq in itertools.product(kinds, BATCHES, LENGTHS):
        ms = 1e3 * roofline.pass_seconds(kind, batch, seq, gamma)  # type: ignore[arg-type]
        values = ("some-model", batch, seq, gamma, mode, 2 * ms, ms, 0.1, ms, ms, 100)
        found.append(dict(zip(NAMES, values, strict=True)))
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "sweep.csv", rows_of())


def change(rows: list[dict[str, Any]], at: tuple[Any, ...], **values: Any) -> None:
    names = ("mode", "gamma", "batch", "seq")
    (row,) = [row for row in rows if tuple(row[n] for n in names) == at]
    row.update(values)


def test_medians_are_read_in_seconds(path: Path) -> None:
    sweep = read_sweep(path)
    assert sweep.model == "some-model"
    assert sweep.gammas == [3, 7]
    assert sweep.grid == [Cell(b, s) for b in BATCHES for s in LENGTHS]
    for kind, batch, seq, gamma, seconds, weight in sweep.readings:
        assert seconds == pytest.approx(ROOFLINE.pass_seconds(kind, batch, seq, gamma))
        assert weight == 1


def test_contamination(tmp_path: Path) -> None:
    rows = rows_of()
    change(rows, ("target_decode", 0, 1, 256), std_ms=1e9)
    change(rows, ("drafter_decode", 3, 8, 512), median_ms=40.0)
    rows.append({**rows[0], "batch": 0, "seq": 0})
    rows.append({**rows[0], "mode": "target_decode_sd"})
    sweep = read_sweep(write(tmp_path / "sweep.csv", rows))
    assert len(sweep.readings) == len(rows) - 2
    doubtful = [reading for reading in sweep.readings if reading.weight < 1]
    assert [reading[:4] for reading in doubtful] == [("target", 1, 256, 0)]
    assert doubtful[0].weight == DOUBTFUL_WEIGHT
    # The last cell is judged, and not fitted to.
    left_out = set(sweep.readings) - set(sweep.fitted())
    assert {Cell(r.rows, r.length) for r in left_out} == {Cell(64, 2048)}
    assert len(left_out) == 1 + 2 * len(GAMMAS)
    cells = [(c, g) for c in sweep.grid for g in GAMMAS if sweep.is_doubtful(c, g)]
    assert cells == [
        *itertools.product([Cell(1, 256), Cell(8, 512), Cell(64, 2048)], GAMMAS)
    ]


def test_a_table_describes_a_clean_sweep(path: Path) -> None:
    sweep = read_sweep(path)
    for fitted, judged in (halves(sweep), halves(sweep)[::-1]):
        assert not set(fitted) & set(judged)
        assert sorted([*fitted, *judged]) == sweep.grid
        costs = PassCosts(sweep.fitted(set(fitted).__contains__))
        found = judge(costs, sweep, judged)
        assert np.mean(found.cycle_errors) < 0.02
        assert len(found.target_errors) == len(judged)
        assert found.num_cycles == 2 * len(judged)


class Wrong:
    """Twice the seconds of drafts; the rest as it is."""

    def pass_seconds(self, kind: Any, rows: int, length: int, gamma: int = 0) -> float:
        factor = 2.0 if kind == "draft" else 1.0
        return factor * ROOFLINE.pass_seconds(kind, rows, length, gamma)


def test_errors_and_misses_by_hand(path: Path) -> None:
    sweep, cell = read_sweep(path), Cell(1, 256)
    found = judge(Wrong(), sweep, [cell])
    assert list(found.target_errors) == pytest.approx([0])
    for gamma, error in zip(GAMMAS, found.cycle_errors, strict=True):
        draft = gamma * ROOFLINE.pass_seconds("draft", *cell)
        cycle = draft + ROOFLINE.pass_seconds("verify", *cell, gamma)
        assert error == pytest.approx(draft / cycle)
    target = ROOFLINE.pass_seconds("target", *cell)
    # 3 x 9 ms against 3 x 4 + 9; predicted, against 3 x 8 + 9. As much for 7.
    assert [miss.gamma for miss in found.misses] == [3, 7]
    for miss in found.misses:
        drafts = miss.gamma * ROOFLINE.pass_seconds("draft", *cell)
        verify = ROOFLINE.pass_seconds("verify", *cell, miss.gamma)
        measured = miss.gamma * target / (drafts + verify)
        predicted = miss.gamma * target / (2 * drafts + verify)
        assert miss.measured == pytest.approx(measured) and measured > 1
        assert miss.predicted == pytest.approx(predicted) and predicted < 1
    assert found.sign_share == 0
    right = judge(ROOFLINE, sweep, [cell])
    assert right.sign_share == 1
    both = joined([found, right])
    assert both.num_cycles == 4
    assert both.sign_share == 0.5


def test_doubtful_cells_are_judged_but_not_clean(tmp_path: Path) -> None:
    rows = rows_of()
    change(rows, ("target_verify", 3, 4, 512), median_ms=1e3, std_ms=1e3)
    sweep = read_sweep(write(tmp_path / "sweep.csv", rows))
    found = judge(ROOFLINE, sweep, [Cell(4, 512)])
    assert len(found.cycle_errors) == 2
    assert max(found.cycle_errors) > 0.9
    assert len(found.clean_errors) == 1
    assert max(found.clean_errors) < 1e-6


def test_a_report_for_reading(path: Path) -> None:
    text = report(read_sweep(path))
    assert "some-model: 28 cells, gammas 3, 7" in text
    for name in ("table", "roofline"):
        assert f"{name}, fitted to all: target MAPE" in text
        assert text.count(f"{name}, fitted to 14 cells, judged on 14") == 2
        assert f"{name}, both halves" in text


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    rows = rows_of()
    without = [{k: v for k, v in row.items() if k != "seq"} for row in rows]
    with pytest.raises(ValueError, match="has no column seq"):
        read_sweep(write(tmp_path / "a.csv", without))
    targets = [row for row in rows if row["mode"] == "target_decode"]
    with pytest.raises(ValueError, match="holds no draft pass"):
        read_sweep(write(tmp_path / "b.csv", targets))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median_ms": "fast"}, "line 3: median_ms='fast' must be milliseconds"),
        ({"median_ms": "nan"}, "line 3: median_ms='nan' must be milliseconds"),
        ({"median_ms": "inf"}, "line 3: median_ms='inf' must be milliseconds"),
        ({"median_ms": 0}, "line 3: median_ms='0' must be milliseconds, above 0"),
        ({"mean_ms": -1}, "line 3: mean_ms='-1' must be milliseconds, 0 or more"),
        ({"std_ms": ""}, "line 3: std_ms='' must be milliseconds"),
        ({"batch": -4}, "line 3: batch='-4' must be a whole number from 0"),
        ({"seq": 2.5}, "line 3: seq='2.5' must be a whole number"),
        ({"seq": 2**31}, "line 3: seq='2147483648' must be a whole number"),
        ({"gamma": 3}, "line 3: gamma=3 of a target pass must be 0"),
        ({"mode": "target_verify"}, "line 3: gamma='0' must be a whole number from 1"),
    ],
)
def test_lines_that_no_pass_has_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rows = rows_of()
    rows[1].update(changes)
    with pytest.raises(ValueError, match=message):
        read_sweep(write(tmp_path / "a.csv", rows))


@pytest.mark.parametrize("data", [b"\x00\x00", b"\xff\xfe,", b"\x89PNG\r\n"])
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.csv (is no CSV|has no column)"):
        read_sweep(path)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """At every byte: an error that names the file, or a sweep of fewer passes."""
    text = write(tmp_path / "whole.csv", rows_of()).read_text()
    head = len(text.splitlines()[0]) + 1
    path = tmp_path / "a.csv"
    for end in [*range(0, head + 90, 7), len(text) - 20]:
        path.write_text(text[:end])
        with pytest.raises(ValueError, match=r"a\.csv"):
            read_sweep(path)


def cells_of(*cells: tuple[int, int]) -> list[dict[str, Any]]:
    return [row for row in rows_of() if (row["batch"], row["seq"]) in cells]


def test_too_few_cells_to_judge_are_refused(tmp_path: Path) -> None:
    few = [(1, 256)], [(1, 256), (2, 256)]
    for cells in few:
        sweep = read_sweep(write(tmp_path / "a.csv", cells_of(*cells)))
        with pytest.raises(
            ValueError, match=rf"a\.csv has {len(cells)} cells of batch and"
        ):
            report(sweep)
    enough = cells_of((1, 256), (1, 512), (2, 256), (2, 512))
    assert "both halves" in report(read_sweep(write(tmp_path / "b.csv", enough)))


def test_a_judgement_needs_a_cycle(path: Path) -> None:
    with pytest.raises(ValueError, match=r"sweep\.csv has no cycle in 0 cells"):
        judge(ROOFLINE, read_sweep(path), [])


def test_no_clean_cell_is_said(path: Path) -> None:
    sweep = read_sweep(path)
    found = judge(ROOFLINE, sweep, [max(sweep.grid)])
    assert "no clean cells" in str(found)
