"""Tables of the records, written into README.md beside this file, or a page of docs.

    python -m benchmarks.report            # rewrites everything below the markers
    python -m benchmarks.report --check    # fails if that would change something

So that no number is copied by hand. Left out: what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import (
    acceptance,
    cold,
    disturbed,
    fuzz,
    host,
    imitation,
    measure,
    plans,
    predicted,
    published,
    sampling,
    scaling,
)

README = measure.ROOT / "benchmarks" / "README.md"
MARKER = "<!-- Below: written by `python -m benchmarks.report` from results/*.json. -->"

# Records with a page of their own, where their section stands below such a line.
PAGES = {
    "plans": measure.ROOT / "docs" / "plan.md",
    "scaling": measure.ROOT / "docs" / "pods.md",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to do.

    Args:
      check: change nothing; fail if the tables are not those of the records.
    """

    check: bool = False


def number(value: Any) -> str:
    """Return a number to three digits, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *([number(v) for v in r] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def iqr_percent(spread: Mapping[str, float]) -> float:
    """Return the distance of the quartiles in percent of the median."""
    return 100 * (spread["q3"] - spread["q1"]) / spread["median"]


def _find(passes: Iterable[Mapping[str, Any]], kind: str, gamma: int = 0) -> Any:
    return next((p for p in passes if (p["kind"], p["gamma"]) == (kind, gamma)), None)


def pass_tables(points: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return one table of passes for each combination of `keys`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(point[key] for key in keys), []).append(point)
    parts = []
    for group, chosen in groups.items():
        first = chosen[0]["passes"]
        gammas = [p["gamma"] for p in first if p["kind"] == "verify"]
        rounds = [p["gamma"] for p in first if p["kind"] == "round"]
        drafts = [p["draft"] for p in first if p["kind"] == "draft"]
        header = ["rows", "AR ms (IQR %)", "AR GB/s"]
        header += [f"{draft} draft / AR" for draft in drafts]
        header += [f"verify of {gamma + 1} / AR" for gamma in gammas]
        header += [f"round {gamma}: kept, speed-up" for gamma in rounds]
        rows = []
        for point in sorted(chosen, key=lambda p: p["rows"]):
            ar = _find(point["passes"], "ar")
            seconds = ar["seconds"]
            row: list[Any] = [
                point["rows"],
                f"{number(1e3 * seconds['median'])} ({iqr_percent(seconds):.0f})",
                ar["bytes_per_s"] / 1e9,
            ]
            for draft in drafts:
                found = [p for p in point["passes"] if p["draft"] == draft]
                found = [p for p in found if p["kind"] == "draft"]
                row.append(found[0]["cost_ratio"]["median"] if found else None)
            for gamma in gammas:
                entry = _find(point["passes"], "verify", gamma)
                row.append(entry and entry["cost_ratio"]["median"])
            for gamma in rounds:
                entry = _find(point["passes"], "round", gamma)
                row.append(
                    entry
                    and f"{number(entry['keep_rate'])}, {number(entry['speedup'])}"
                )
            rows.append(row)
        named = zip(keys, group, strict=True)
        words = [f"{key.replace('_', ' ')} {value}" for key, value in named]
        parts += [", ".join(words) + ":", markdown(header, rows)]
    return parts


def control_table(point: Mapping[str, Any]) -> list[str]:
    """Return one table of controls."""
    rows = []
    for entry in point["controls"]:
        seconds = entry["seconds"]
        static = entry.get("speedup_over_static")
        host = entry.get("host_share")
        agreement = entry.get("agreement_with_ar")
        rows.append(
            [
                entry["control"],
                f"{number(seconds['median'])} ({iqr_percent(seconds):.0f})",
                entry["tokens_per_s"],
                entry["speedup_over_ar"]["median"],
                static and static["median"],
                entry.get("keep_rate"),
                None if host is None else 100 * host,
                agreement["num_ties"]
                if agreement
                else entry.get("num_sequences_that_differ"),
            ]
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
    return [title, markdown(header, rows)]


def sweep_tables(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one table of speeds over rows for each preset."""
    parts = []
    for preset in dict.fromkeys(point["preset"] for point in points):
        chosen = [point for point in points if point["preset"] == preset]
        names = [entry["control"] for entry in chosen[0]["controls"]]
        rows = [
            [
                point["rows"],
                point["controls"][0]["tokens_per_s"],
                *(e["speedup_over_ar"]["median"] for e in point["controls"][1:]),
                point["best_fixed"],
                point["best_over_best_fixed"]["median"],
            ]
            for point in chosen
        ]
        header = ["rows", "ar tokens/s", *(f"{name} / ar" for name in names[1:])]
        header += ["best fixed", "best / best fixed"]
        length = chosen[0]["max_new_tokens"]
        parts += [
            f"{preset}, as many prompts as rows, {length} tokens each, "
            f"{chosen[0]['dtype']}:",
            markdown(header, rows),
        ]
    return parts


def section(record: Mapping[str, Any]) -> str:
    """Return the section of one record."""
    points = record["points"]
    parts = [f"### {record['benchmark']}", measure.conditions(record) + "."]
    if record["benchmark"] == "steps":
        keys = ("preset", "cache_length", "dtype")
        parts += pass_tables(points, keys)
    for point in points:
        if point.get("part") == "cold":
            parts.append(
                f"Cold start of the quick start: {number(point['seconds']['median'])} "
                f"s from import to result, {number(point['process_s']['median'])} s "
                "with the process around it."
            )
    timed = [point for point in points if point.get("part") == "passes"]
    parts += pass_tables(timed, ("preset", "num_layers", "cache_length", "dtype"))
    for point in points:
        if point.get("part") in ("workload", "rollout"):
            parts += control_table(point)
    parts += sweep_tables([p for p in points if p.get("part") == "rows"])
    if record["benchmark"] == "published":
        parts.append(markdown(*published.setting_rows(points)))
        parts.append(markdown(*published.control_rows(record["controls"])))
    if record["benchmark"] == "acceptance":
        parts.append(markdown(*acceptance.rows_of(points)))
    if record["benchmark"] == "predicted":
        for point in points:
            parts.append(f"{point['preset']}, {point['dtype']}:")
            parts += [predicted.summary(point)]
            parts.append(markdown(*predicted.cell_rows(point)))
            parts.append(markdown(*predicted.rollout_rows(point)))
    if record["benchmark"] == "plans":
        parts.append(markdown(*plans.rows_of(points)))
    if record["benchmark"] == "sampling":
        parts.append(markdown(*sampling.rows_of(points)))
    if record["benchmark"] == "scaling":
        parts.append(markdown(*scaling.rows_of(points)))
    if record["benchmark"] == "imitation":
        parts.append(markdown(*imitation.rows_of(points)))
    if record["benchmark"] == "cold":
        parts.append(markdown(*cold.rows_of(points)))
    if record["benchmark"] == "host":
        parts.append(markdown(*host.rows_of(points)))
    if record["benchmark"] == "fuzz":
        parts.append(fuzz.summary(record))
        parts.append(markdown(*fuzz.rows_of(points)))
    if record["benchmark"] == "disturbed":
        parts.append(markdown(*disturbed.rows_of(points)))
    for check in record.get("checks", ()):
        parts.append(
            f"Against the CPU, {check['dtype']}: logits differ by at most "
            f"{number(check['max_logit_difference'])}, correct: {check['correct']}."
        )
    for skipped in record.get("skipped", ()):
        parts.append(f"Not measured: {skipped['what']} ({skipped['why']}).")
    return "\n\n".join(parts)


def report(directory: Path = measure.RESULTS, page: str | None = None) -> str:
    """Return the sections of the records in a directory that belong on one page.

    Args:
      page: name of a record with a page of its own; None is the README.
    """
    records = [
        json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))
    ]
    return "\n\n".join(
        section(record)
        for record in records
        if page == (record["benchmark"] if record["benchmark"] in PAGES else None)
    )


def updated(
    text: str, directory: Path = measure.RESULTS, page: str | None = None
) -> str:
    """Return a page with the tables of its records below its marker.

    Raises:
      ValueError: it has no marker.
    """
    marker = MARKER
    if page is not None:
        marker = MARKER.replace("results/*.json", f"benchmarks/results/{page}.json")
    if marker not in text:
        raise ValueError(f"the page has no line {marker!r}")
    head, _, _ = text.partition(marker)
    return f"{head}{marker}\n\n{report(directory, page)}".rstrip() + "\n"


def main(args: Args) -> None:
    """Rewrite the tables, or check them.

    Raises:
      SystemExit: they are not those of the records, and were not to be changed.
    """
    targets: list[tuple[str | None, Path]] = [(None, README), *PAGES.items()]
    for page, path in targets:
        before = path.read_text()
        after = updated(before, page=page)
        if args.check and after != before:
            raise SystemExit(f"{path.name}: run python -m benchmarks.report")
        if not args.check:
            path.write_text(after)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.report"))
