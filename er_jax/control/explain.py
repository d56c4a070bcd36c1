"""Why drafts ran or did not, as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from er_jax.control.controller import Controller
from er_jax.request import offered_views
from er_jax.types import FIRST_DRAFT, Program, View

# Batch sizes to show at most; of more, the smallest, the largest and some between.
MAX_SIZES = 4


def explain(controller: Controller, ran: Sequence[Program]) -> str:
    """Explain a controller's choice between drafts and plain decoding.

    Args:
      controller: made the choices. ran: the programs of a rollout's windows, in order.
    Returns:
      Lines: the share of windows with drafts; the cost of a round in plain steps; the
      share of drafts that is used; the predicted speed-up at the batch sizes that ran.
    """
    drafting = [gamma for gamma in controller.gammas if gamma]
    if not drafting or not ran:
        return f"no drafts: control={controller.control!r}"
    count = sum(program.gamma > 0 for program in ran)
    head = f"drafts in {count} of {len(ran)} windows"
    if 0 not in controller.gammas:
        return f"{head}: control={controller.control!r}"
    if not controller.knows_drafts:
        return (
            f"{head}: what they cost is not known yet; two programs are compiled to "
            "find out once plain decoding has taken about six times as long as that"
        )
    costs = _sizes(controller, ran)
    if not costs:
        return head
    middle = min(drafting, key=lambda gamma: abs(gamma - 4))
    lines = [head]
    for view in controller.views:
        at = [
            (rows, length)
            for rows, length in costs
            if view in offered_views(controller.views, length, middle)
        ]
        if at:
            lines += _costs_and_use(controller, at, middle, view)
    ups = [
        (rows, *_best(controller, Program(rows, length, 0))) for rows, length in costs
    ]
    shown = ", ".join(
        f"{up:.2f} at {_rows(rows)} ({_named(best)})" for rows, best, up in ups
    )
    lines.append(f"predicted speed-up of the best draft length: {shown}")
    if count == 0 and max(up for *_, up in ups) < 1:
        lines.append("so plain decoding is the fastest here: nothing is amiss")
    return "\n  ".join(lines)


def _named(program: Program) -> str:
    view = f", {program.view}" if program.view != FIRST_DRAFT else ""
    return f"gamma {program.gamma}{view}"


def _costs_and_use(
    controller: Controller,
    sizes: Sequence[tuple[int, int]],
    gamma: int,
    view: View,
) -> list[str]:
    """Return the lines about drafts of one kind: their costs, and how many are used."""
    costs = _round_costs(controller, sizes, gamma, view)
    used = _used(controller, gamma, view)
    if view == FIRST_DRAFT:
        return [costs, used]
    return [f"{view}: {costs}", used]


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _sizes(controller: Controller, ran: Sequence[Program]) -> list[tuple[int, int]]:
    """Return (rows, cache length) of programs that ran and have a known cost."""
    lengths = {p.rows: p.cache_length for p in ran if not p.shared_rows}
    lengths.setdefault(controller.least_rows, max(p.cache_length for p in ran))
    known = [
        (rows, length)
        for rows, length in sorted(lengths.items())
        if controller.table.round_seconds(Program(rows, length, 0))
    ]
    if len(known) <= MAX_SIZES:
        return known
    step = (len(known) - 1) / (MAX_SIZES - 1)
    return [known[round(i * step)] for i in range(MAX_SIZES)]


def _round_costs(
    controller: Controller,
    sizes: Sequence[tuple[int, int]],
    gamma: int,
    view: View,
) -> str:
    """Return the line about costs of rounds with drafts, in plain steps."""
    table, found = controller.table, []
    for rows, length in sizes:
        plain_s = table.round_seconds(Program(rows, length, 0))
        program = Program(rows, length, gamma).drafting(view)
        round_s = table.round_seconds(program)
        if plain_s and round_s:
            how = "" if program in table.seconds else ", predicted"
            found.append(f"{round_s / plain_s:.2f} at {_rows(rows)}{how}")
    return f"a round of {gamma} drafts costs plain steps: {', '.join(found)}"


def _used(controller: Controller, gamma: int, view: View) -> str:
    """Return the line about how many drafts are used, and how that is known."""
    estimate = controller.acceptance_of(view)
    tokens = estimate.tokens_per_round(gamma)
    tested = float(estimate.tested[:gamma].sum())
    if tested < 1:
        how = "as of a good drafter: none has run yet"
    else:
        share = float(estimate.kept[:gamma].sum()) / tested
        how = f"{100 * share:.1f} % of those tested were used"
    return f"such a round emits {tokens:.2f} tokens of {gamma + 1} ({how})"


def _best(controller: Controller, plain: Program) -> tuple[Program, float]:
    """Return the fastest program with drafts and its speed over plain decoding."""
    plain_speed = controller.speed(plain) or 1.0
    programs = [
        plain._replace(gamma=gamma).drafting(view)
        for gamma in controller.gammas
        if gamma
        for view in offered_views(controller.views, plain.cache_length, gamma)
    ]
    speeds = {p: (controller.speed(p) or 0.0) / plain_speed for p in programs}
    best = max(speeds, key=speeds.__getitem__)
    return best, speeds[best]
