"""Tables of the records, written into README.md beside this file, or a page of docs.

    python -m benchmarks.report            # rewrites everything below the markers
    python -m benchmarks.report --check    # fails if that would change something

So no number is copied by hand. Left out: what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import (
    acceptance,
    cold,
    commits,
    disturbed,
    fuzz,
    host,
    imitation,
    journal,
    killed,
    limits,
    living,
    long_caches,
    partial,
    peers,
    plans,
    predicted,
    published,
    sampling,
    scaling,
    session,
    stream,
    text,
    tool,
    traffic,
    trainer_gap,
    tunix,
)
from benchmarks.lib import expectations, measure, pass_points, records
from benchmarks.lib.tables import Table, markdown, number

README = records.ROOT / "benchmarks" / "README.md"
MARKER = "<!-- Below: written by `python -m benchmarks.report` from results/*.json. -->"

# Records with a page of their own, where their section stands below such a line.
PAGES = {
    "peers": records.ROOT / "docs" / "peers.md",
    "plans": records.ROOT / "docs" / "plan.md",
    "scaling": records.ROOT / "docs" / "pods.md",
    "traffic": records.ROOT / "docs" / "limits.md",
}

# The page of the decision table, which is made from several records.
DECISIONS = records.ROOT / "docs" / "expect.md"

# Records that stand on the page of another one.
BESIDE = {"limits": "traffic"}

Record = Mapping[str, Any]

# Records whose points are one table.
POINT_TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    "cold": cold.rows_of,
    "commits": commits.rows_of,
    "disturbed": disturbed.rows_of,
    "fuzz": fuzz.rows_of,
    "host": host.rows_of,
    "imitation": imitation.rows_of,
    "journal": journal.rows_of,
    "killed": killed.rows_of,
    "living": living.rows_of,
    "long_caches": long_caches.rows_of,
    "partial": partial.replay_rows,
    "peers": peers.rows_of,
    "plans": plans.rows_of,
    "published": published.setting_rows,
    "sampling": sampling.rows_of,
    "scaling": scaling.rows_of,
    "session": session.rows_of,
    "stream": stream.rows_of,
    "text": text.rows_of,
    "tool": tool.rows_of,
    "traffic": traffic.rows_of,
    "trainer_gap": trainer_gap.rows_of,
    "tunix": tunix.rows_of,
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to do.

    Args:
      check: change nothing; fail if the tables are not those of the records.
    """

    check: bool = False


def control_table(point: Record) -> list[str]:
    """Return a title and a table of the controls that ran one task."""
    rows: list[tuple[Any, ...]] = []
    for entry in point["controls"]:
        seconds = entry["seconds"]
        static, host_share = entry.get("speedup_over_static"), entry.get("host_share")
        agreement = entry.get("agreement_with_ar")
        num_differ = entry.get("num_sequences_that_differ")
        rows.append(
            (
                entry["control"],
                f"{number(seconds['median'])} ({measure.iqr_percent(seconds):.0f})",
                entry["tokens_per_s"],
                entry["speedup_over_ar"]["median"],
                static and static["median"],
                entry.get("keep_rate"),
                None if host_share is None else 100 * host_share,
                agreement["num_ties"] if agreement else num_differ,
            )
        )
    header = [
        "control", "s (IQR %)", "tokens/s", "speed / ar", "speed / static", "kept",
        "host %", "differ",
    ]  # fmt: skip
    lengths = point["lengths"]
    title = (
        f"{point['preset']}, {point['workload']}: {lengths['num']} completions, mean "
        f"{number(lengths['mean'])}, median {number(lengths['p50'])}, longest "
        f"{lengths['max']} tokens; {point['rows']} slots, {point['dtype']}:"
    )
    return [title, markdown((header, rows))]


def sweep_tables(points: Sequence[Record]) -> list[str]:
    """Return a title and a table of speeds over rows, for each preset."""
    parts = []
    for preset in dict.fromkeys(point["preset"] for point in points):
        chosen = [point for point in points if point["preset"] == preset]
        names = [entry["control"] for entry in chosen[0]["controls"]]
        rows = [
            (
                point["rows"],
                point["controls"][0]["tokens_per_s"],
                *(e["speedup_over_ar"]["median"] for e in point["controls"][1:]),
                point["best_fixed"],
                point["best_over_best_fixed"]["median"],
            )
            for point in chosen
        ]
        header = ["rows", "ar tokens/s", *(f"{name} / ar" for name in names[1:])]
        header += ["best fixed", "best / best fixed"]
        length = chosen[0]["max_new_tokens"]
        parts += [
            f"{preset}, as many prompts as rows, {length} tokens each, "
            f"{chosen[0]['dtype']}:",
            markdown((header, rows)),
        ]
    return parts


def parts_tables(points: Sequence[Record]) -> list[str]:
    """Return text and tables of rollouts and accelerators, by the points' parts."""

    def of(*parts: str) -> list[Record]:
        return [point for point in points if point.get("part") in parts]

    found = [
        f"Cold start of the quick start: {number(point['seconds']['median'])} s from "
        f"import to result, {number(point['process_s']['median'])} s with the process "
        "around it."
        for point in of("cold")
    ]
    keys = ("preset", "num_layers", "cache_length", "dtype")
    found += pass_points.page_tables(of("passes"), keys)
    for point in of("workload", "rollout"):
        found += control_table(point)
    return found + sweep_tables(of("rows"))


def predicted_tables(points: Sequence[Record]) -> list[str]:
    """Return title, summary and two tables of each policy that was predicted."""
    found = []
    for point in points:
        found += [
            f"{point['preset']}, {point['dtype']}:",
            predicted.summary(point),
            markdown(predicted.cell_rows(point)),
            markdown(predicted.rollout_rows(point)),
        ]
    return found


def section(record: Record) -> str:
    """Return the section of one record."""
    name, points = record["benchmark"], record["points"]
    parts = [f"### {name}", records.conditions(record) + "."]
    if name == "fuzz":
        parts.append(fuzz.summary(record))
    if name == "killed":
        parts.append(killed.summary(record))
    if name == "living":
        parts.append(living.summary(record))
    if name == "text":
        parts.append(text.summary(record))
    if name in POINT_TABLES:
        parts.append(markdown(POINT_TABLES[name](points)))
    elif name == "acceptance":
        parts += acceptance.page_tables(points)
    elif name == "steps":
        parts += pass_points.page_tables(points, ("preset", "cache_length", "dtype"))
    elif name == "predicted":
        parts += predicted_tables(points)
    elif name != "limits":
        parts += parts_tables(points)
    if name == "limits":
        parts += [
            "The best speed over plain decoding of a batch, and the gamma it takes:",
            markdown(limits.batch_rows(points)),
            "Time that a rollout takes less than with plain decoding:",
            markdown(limits.rollout_rows(points)),
        ]
    if name == "partial":
        parts += [
            "In training, beside whole rollouts, both in turn:",
            markdown(partial.demo_rows(points)),
        ]
    if name == "published":
        parts.append(markdown(published.control_rows(record["controls"])))
    for check in record.get("checks", ()):
        parts.append(
            f"Against the CPU, {check['dtype']}: logits differ by at most "
            f"{number(check['max_logit_difference'])}, correct: {check['correct']}."
        )
    for skipped in record.get("skipped", ()):
        parts.append(f"Not measured: {skipped['what']} ({skipped['why']}).")
    return "\n\n".join(parts)


def report(directory: Path = records.RESULTS, page: str | None = None) -> str:
    """Return the sections of the records that belong on one page.

    Args:
      directory: of the records. page: name of a record with a page of its own; None is
        the README.
    """
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]

    def page_of(name: str) -> str | None:
        name = BESIDE.get(name, name)
        return name if name in PAGES else None

    return "\n\n".join(
        section(record) for record in found if page == page_of(record["benchmark"])
    )


def updated(
    before: str, directory: Path = records.RESULTS, page: str | None = None
) -> str:
    """Return a page with the tables of its records below its marker.

    Raises:
      ValueError: it has no marker.
    """
    marker = MARKER
    if page is not None:
        marker = MARKER.replace("results/*.json", f"benchmarks/results/{page}.json")
    if marker not in before:
        raise ValueError(f"the page has no line {marker!r}")
    head, _, _ = before.partition(marker)
    return f"{head}{marker}\n\n{report(directory, page)}".rstrip() + "\n"


def decided(before: str, directory: Path = records.RESULTS) -> str:
    """Return the page of the decision table with the table of the records.

    Raises:
      ValueError: it has no marker.
    """
    marker = MARKER.replace("results/*.json", "benchmarks/results/*.json")
    if marker not in before:
        raise ValueError(f"the page has no line {marker!r}")
    table = markdown(expectations.rows_of(directory))
    return f"{before.partition(marker)[0]}{marker}\n\n{table}\n"


def main(args: Args) -> None:
    """Rewrite the tables, or check them.

    Raises:
      SystemExit: they are not those of the records, and were not to be changed.
    """
    pages: list[tuple[str | None, Path]] = [(None, README), *PAGES.items()]
    targets: list[tuple[Path, Callable[[str], str]]] = [
        (path, functools.partial(updated, page=page)) for page, path in pages
    ]
    for path, update in [*targets, (DECISIONS, decided)]:
        before = path.read_text()
        after = update(before)
        if args.check and after != before:
            raise SystemExit(f"{path.name}: run python -m benchmarks.report")
        if not args.check:
            path.write_text(after)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.report"))
