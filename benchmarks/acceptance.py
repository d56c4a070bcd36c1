"""How often drafts are kept: by quantization, rule, depth, position, and what they see.

    python -m train.grpo arithmetic                        # a policy to study
    python -m benchmarks.acceptance runs/arithmetic
    python -m benchmarks.text runs/text                    # a larger one, on real text
    python -m benchmarks.acceptance runs/text --model text
    python -m benchmarks.acceptance runs/arithmetic --quick

There are two studies. *formats* (of the demo only, `lib/kept_formats.py`): drafts of
twelve quantization formats that see all, measured by drafting in every round and
expected from distributions, by depth and position. *views* (`lib/kept_views.py`):
drafts that see the first and the last positions of the target's cache only, or a copy
of it in 8 or 4 bits, beside drafts that see all.

The demo is studied after its warm-up and after reinforcement learning, on its run's
held-out prompts. The text model goes on with pieces of held-out files.

The results are of these small policies. Others differ.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.lib import kept_formats, presets, records, tables, text_model, trained
from benchmarks.lib.corpus import STOP_ID, held_out_pieces, load_corpus
from benchmarks.lib.kept_views import RULES, Plan, sample, study
from benchmarks.lib.views import View

# Bytes of the text model's prompts: shortest and longest.
PROMPT_BYTES = (64, 512)

DEMO_PLAN = Plan(
    edges=kept_formats.POSITIONS,
    num_tokens=kept_formats.MAX_NEW_TOKENS,
    rollout_tokens=kept_formats.MAX_NEW_TOKENS,
)

# What `benchmarks.report` writes below the heading of a record of views.
READING = (
    "*entries*: the share of the cache's entries that drafts read, over all positions; "
    "*expected*: by closed forms, with the standard error over texts; *drawn*: with "
    "the noise of rollouts; first drafts of rounds that begin anywhere."
)

QUICK = {
    "drafts": ("int4",),
    "windows": (8,),
    "heads": (0, "prompt"),
    "bits": (4,),
    "edges": (0, 8),
    "num_tokens": 24,
    "rollout_tokens": 24,
    "deep": (View(8, "prompt"),),
    "gammas": (2,),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to study.

    Args:
      run: directory of a run of train.grpo, or of benchmarks.text.
      model: which of the two.
      studies: see the module; the text model has no formats.
      gamma: drafts per round, of formats.
      samples: completions of each held-out prompt of the demo.
      texts: prompts of the text model. tokens: limit of its completions.
      library: directory of the text model's files; None is this Python's own library.
      out: where to write. quick: a few of everything, to see that it runs.
    """

    run: tyro.conf.Positional[Path]
    model: Literal["demo", "text"] = "demo"
    studies: tuple[Literal["formats", "views"], ...] = ("formats", "views")
    gamma: int = 8
    samples: int = 4
    texts: int = 16
    tokens: int = 1536
    library: Path | None = None
    out: Path | None = None
    quick: bool = False


def plan_of(args: Args) -> Plan:
    """Return what to look at."""
    text_plan = Plan(num_tokens=args.tokens)
    plan = DEMO_PLAN if args.model == "demo" else text_plan
    return dataclasses.replace(plan, **QUICK) if args.quick else plan  # type: ignore[arg-type]


def text_prompts(args: Args, count: int) -> list[list[int]]:
    """Return pieces of held-out files, of lengths spread evenly by their logarithm."""
    shortest, longest = (8, 16) if args.quick else PROMPT_BYTES
    lengths = np.geomspace(shortest, longest, count).round().astype(int)
    pieces = held_out_pieces(load_corpus(args.library), count, longest)
    return [
        piece[:length].tolist() for piece, length in zip(pieces, lengths, strict=True)
    ]


def demo_views(args: Args) -> Iterator[dict[str, Any]]:
    """Yield points of the demo, after its warm-up and trained."""
    plan = plan_of(args)
    for label, step in kept_formats.STEPS.items():
        run = trained.load_run(args.run, step=step)
        prompts = run.prompts[: 8 if args.quick else None] * args.samples
        texts = sample(
            run.policy, run.params, prompts, (trained.STOP_ID,), plan.num_tokens
        )
        common = {"preset": args.run.name, "policy": label}
        yield from study(texts, plan, common)


def text_views(args: Args) -> Iterator[dict[str, Any]]:
    """Yield points of the text model."""
    plan = plan_of(args)
    policy, params, progress = text_model.load_text_model(args.run)
    prompts = text_prompts(args, 3 if args.quick else args.texts)
    texts = sample(policy, params, prompts, (STOP_ID,), plan.num_tokens)
    common = {
        "preset": "text",
        "policy": "text",
        "num_params": presets.num_params(params),
        "trained_tokens": progress["tokens"],
    }
    yield from study(texts, plan, common)


def view_name(point: Mapping[str, Any]) -> str:
    """Return a view in words."""
    if point["bits"] is not None:
        return f"all, {point['bits']}-bit copy"
    if point["window"] is None:
        return "all"
    head = {0: "", "prompt": ", prompt"}.get(point["head"], f", first {point['head']}")
    return f"last {point['window']}{head}"


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def view_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of `views` of one policy, in per cent."""
    edges = points[0]["edges"]
    rows: list[tuple[Any, ...]] = [
        (
            p["draft"],
            view_name(p),
            100 * p["entries_share"],
            *_percent(
                [p[rule][key] for rule in RULES for key in ("expected", "drawn")]
            ),
            100 * p["coupled"]["error"] if p["coupled"]["error"] else None,
            *_percent(p["coupled"]["expected_by_position"]),
        )
        for p in points
    ]
    header = (
        "draft",
        "sees",
        "entries %",
        *(f"{rule}, {key} %" for rule in RULES for key in ("expected", "drawn")),
        "± coupled",
        *(f"coupled from {edge}" for edge in edges),
    )
    return header, rows


def depth_rows(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of chances by depth, expected and in rollouts."""
    deepest = max(p["gamma"] for p in points)

    def of_depths(values: Sequence[float]) -> list[float | None]:
        return _percent([*values, *[None] * (deepest - len(values))])

    rows: list[tuple[Any, ...]] = []
    for p in points:
        is_rollout = p["part"] == "rollouts"
        sees = "all" if is_rollout else view_name(p)
        kind = "rollout" if is_rollout else "expected"
        for rule in RULES:
            chances = p[rule]["by_depth"] if is_rollout else p[rule]
            told = (p["draft"], sees, p["gamma"], rule, kind)
            per_round = p[rule]["tokens_per_round"] if is_rollout else None
            rows.append((*told, *of_depths(chances), per_round))
    header = (
        "draft", "sees", "drafts", "rule", "", *map(str, range(1, deepest + 1)),
        "tokens/round",
    )  # fmt: skip
    return header, rows


def page_tables(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return text and Markdown tables of a record's points, of either study."""
    if "part" not in points[0]:
        return [tables.markdown(kept_formats.rows_of(points))]
    found = [READING]
    for label in dict.fromkeys(p["policy"] for p in points):
        own = [p for p in points if p["policy"] == label]
        first = own[0]
        found.append(
            f"{first['preset']}, {label}, {first['dtype']}: {first['rows']} texts, "
            f"{first['num_tokens']} tokens, longest context {first['longest']}; the "
            f"target draws {100 * first['same_draws']:.2f} % of the text again:"
        )
        apart = [p for p in own if p["part"] == "views"]
        deep = [p for p in own if p["part"] != "views"]
        found.append(tables.markdown(view_rows(apart)))
        if deep:
            found += ["By depth:", tables.markdown(depth_rows(deep))]
    return found


def plot_views(record: dict[str, Any], path: Path) -> None:
    """Draw the coupled chance over the window and over the position, and save it."""
    points = [p for p in record["points"] if p["part"] == "views"]
    labels = list(dict.fromkeys(p["policy"] for p in points))
    drafts = list(dict.fromkeys(p["draft"] for p in points))
    picture, axes = records.figure(len(drafts), len(labels))
    for line, label in zip(axes, labels, strict=True):
        for axis, draft in zip(line, drafts, strict=True):
            own = [p for p in points if (p["policy"], p["draft"]) == (label, draft)]
            for number, head in enumerate(dict.fromkeys(p["head"] for p in own)):
                part = [p for p in own if p["head"] == head and p["window"]]
                windows = [p["window"] for p in part]
                for rule, style in zip(RULES, (".-", ".:"), strict=True):
                    chances = [p[rule]["expected"] for p in part]
                    name = f"head {head}" if rule == "coupled" else None
                    axis.plot(windows, chances, style, color=f"C{number}", label=name)
            for p in own:
                if p["window"] is None:
                    axis.axhline(p["coupled"]["expected"], color="grey", linewidth=0.6)
            axis.set(title=f"{label}, {draft}: kept", xlabel="window")
            axis.set_xscale("log", base=2)
            axis.legend(
                title="dotted: token rule; grey: no window",
                fontsize="xx-small",
                title_fontsize="xx-small",
            )
    records.save_figure(picture, record, path)


def record_of(
    args: Args, name: str, points: Iterator[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Write points into a record as they come; return it."""
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("acceptance", settings)
    for point in points:
        record["points"].append(point)
        records.save(out / f"{name}.json", record)
    print(f"written: {name}.json in {out.name}", file=sys.stderr)
    return record


def main(args: Args) -> list[dict[str, Any]]:
    """Study, print, and write records and pictures; return the records.

    Raises:
      ValueError: nothing to study.
    """
    out, found = records.results_dir(args.out, args.quick), []
    settings = {"run": args.run.name, "samples": args.samples}
    if "formats" in args.studies and args.model == "demo":
        points = kept_formats.study(
            args.run, gamma=args.gamma, samples=args.samples, quick=args.quick
        )
        told = {**settings, "gamma": args.gamma}
        record = record_of(args, "acceptance", points, told)
        print(tables.text(kept_formats.rows_of(record["points"])))
        kept_formats.plot(record, out / "acceptance.png")
        found.append(record)
    if "views" in args.studies:
        is_demo = args.model == "demo"
        points = demo_views(args) if is_demo else text_views(args)
        told = {"run": args.run.name, "plan": dataclasses.asdict(plan_of(args))}
        name = f"acceptance_{args.model}"
        record = record_of(args, name, points, told)
        print("\n\n".join(page_tables(record["points"])))
        plot_views(record, out / f"{name}.png")
        found.append(record)
    if not found:
        raise ValueError(f"studies={args.studies} leave nothing of {args.model}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.acceptance"))
