"""The point of a record that holds timed passes: its numbers, tables and lines.

The speed-up of a round is the tokens that it yields, by the acceptance measured in the
very same rounds, over its cost in autoregressive passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.lib import measure, pass_bytes, passes, tables
from benchmarks.lib.passes import Pass


def point(
    bench: passes.Bench,
    readings: Mapping[str, Sequence[float]],
    timed: Sequence[Pass],
) -> dict[str, Any]:
    """Return what was measured at one batch shape, ready for the record.

    Args:
      bench: what ran. readings: label -> seconds per pass. timed: the passes.
    """
    target = pass_bytes.weight_bytes(bench.params)
    cache = pass_bytes.cache_bytes(bench.policy, bench.rows, bench.cache_length)
    ar = readings[Pass("ar").label]
    found = []
    for pass_ in timed:
        draft = pass_bytes.weight_bytes(bench.draft(pass_)) if pass_.draft else 0
        must_read = pass_bytes.pass_bytes(pass_, target, draft, cache)
        seconds = measure.spread(readings[pass_.label])
        entry: dict[str, Any] = {
            "kind": pass_.kind,
            "gamma": pass_.gamma,
            "draft": pass_.draft,
            "seconds": seconds,
            "compile_s": bench.compile_s[pass_],
            "bytes": must_read,
            "bytes_per_s": must_read / seconds["median"],
            "cost_ratio": measure.paired_ratio(readings[pass_.label], ar),
        }
        if pass_.kind == "round":
            tokens = bench.tokens_per_round(pass_)
            entry["tokens_per_round"] = tokens
            entry["keep_rate"] = bench.keep_rate(pass_)
            entry["tokens_per_s"] = bench.rows * tokens / seconds["median"]
            entry["speedup"] = tokens / entry["cost_ratio"]["median"]
        elif pass_.kind == "ar":
            entry["tokens_per_s"] = bench.rows / seconds["median"]
        found.append(entry)
    return {
        "rows": bench.rows,
        "cache_length": bench.cache_length,
        "target_bytes": target,
        "cache_bytes": cache,
        "passes": found,
    }


def lines(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the points as text, one line per pass."""
    rows = [
        (
            f"{p['preset']} {p['rows']}x{p['cache_length']}",
            " ".join(str(x) for x in (e["kind"], e["gamma"] or "", e["draft"]) if x),
            1e3 * e["seconds"]["median"],
            measure.iqr_percent(e["seconds"]),
            e["cost_ratio"]["median"],
            e["bytes"] / 1e6,
            e["bytes_per_s"] / 1e9,
            e.get("keep_rate", ""),
            e.get("speedup", ""),
        )
        for p in points
        for e in p["passes"]
    ]
    header = ("shape", "pass", "ms", "IQR %", "/AR", "MB", "GB/s", "kept", "speed-up")
    return tables.text((header, rows))


def page_tables(points: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a title and a Markdown table for each combination of values of `keys`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for found in points:
        groups.setdefault(tuple(found[key] for key in keys), []).append(found)
    parts = []
    for group, chosen in groups.items():
        named = zip(keys, group, strict=True)
        words = [f"{key.replace('_', ' ')} {value}" for key, value in named]
        parts += [", ".join(words) + ":", tables.markdown(_table(chosen))]
    return parts


def _table(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows, one per number of rows; columns by the first point."""
    first = points[0]["passes"]
    gammas = [p["gamma"] for p in first if p["kind"] == "verify"]
    rounds = [p["gamma"] for p in first if p["kind"] == "round"]
    drafts = [p["draft"] for p in first if p["kind"] == "draft"]
    header = ["rows", "AR ms (IQR %)", "AR GB/s"]
    header += [f"{draft} draft / AR" for draft in drafts]
    header += [f"verify of {gamma + 1} / AR" for gamma in gammas]
    header += [f"round {gamma}: kept, speed-up" for gamma in rounds]
    rows = []
    for found in sorted(points, key=lambda p: p["rows"]):
        entries = found["passes"]
        ar = _find(entries, kind="ar")
        ms, iqr = 1e3 * ar["seconds"]["median"], measure.iqr_percent(ar["seconds"])
        row: list[Any] = [
            found["rows"],
            f"{tables.number(ms)} ({iqr:.0f})",
            ar["bytes_per_s"] / 1e9,
        ]
        for draft in drafts:
            entry = _find(entries, kind="draft", draft=draft)
            row.append(entry and cost_ratio(entry))
        for gamma in gammas:
            entry = _find(entries, kind="verify", gamma=gamma)
            row.append(entry and cost_ratio(entry))
        for gamma in rounds:
            entry = _find(entries, kind="round", gamma=gamma)
            pair = entry and (entry["keep_rate"], entry["speedup"])
            row.append(pair and ", ".join(map(tables.number, pair)))
        rows.append(tuple(row))
    return header, rows


def _find(entries: Iterable[Mapping[str, Any]], **about: Any) -> Any:
    """Return the first pass with these values, None if there is none."""
    matching = (e for e in entries if all(e[key] == about[key] for key in about))
    return next(matching, None)


def draw(
    ax: Any,
    points: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    value: Callable[[Mapping[str, Any]], float],
    about: str,
    **options: Any,
) -> None:
    """Draw a number of each pass over rows, one line per pass.

    Args:
      ax: matplotlib axes. points: of one shape, in the order of rows.
      kinds: of the passes to draw. value: of an entry of `passes`, its number.
      about: what the label says beside the pass. options: of `ax.plot`.
    """
    names = dict.fromkeys(
        (e["kind"], e["gamma"], e["draft"]) for p in points for e in p["passes"]
    )
    for index, (kind, gamma, draft) in enumerate(names):
        if kind not in kinds:
            continue
        found = [
            (p["rows"], value(entry))
            for p in points
            if (entry := _find(p["passes"], kind=kind, gamma=gamma, draft=draft))
        ]
        label = " ".join(str(word) for word in (kind, gamma, draft) if word)
        ax.plot(
            *zip(*found, strict=True),
            color=f"C{index}",
            label=f"{label}, {about}",
            **options,
        )


def cost_ratio(entry: Mapping[str, Any]) -> float:
    """Return the cost of a pass in autoregressive passes."""
    return entry["cost_ratio"]["median"]
