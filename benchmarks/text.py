"""A byte-level policy trained on real text, and what it knows of texts it has not seen.

    python -m benchmarks.text runs/text --train-minutes 60
    python -m benchmarks.text runs/text --quick

The text is the running Python's own library (`lib/corpus.py`), the recipe
`lib/text_model.py`. A run that was cut off goes on where it was saved.

The result is the loss on held-out files, in bits per byte, by the position in a context
of 512 and of 2048 bytes: whether it falls says whether the policy uses what is far
back. Positions are told over the same pieces, but bytes behind are other bytes; so the
same last bytes are also told with a shorter context.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.lib import presets, records, tables, text_model
from benchmarks.lib.corpus import Corpus, held_out_pieces, load_corpus
from benchmarks.lib.text_model import MODEL, Recipe, Stage
from er_jax import Decoder

# Losses are told from each of these positions to the next.
EDGES = (0, 64, 128, 256, 512, 1024, 2048)

# The last bytes of the longest pieces, that are told again with shorter contexts.
LAST = 256

# Pieces evaluated together.
ROWS = 4


@dataclasses.dataclass(frozen=True)
class Args:
    """What to train.

    Args:
      run: directory of the checkpoints.
      train_minutes: of training, by the clock, those of earlier runs included.
      pieces: held-out pieces of the longest context to evaluate on.
      library: directory of the files; None is this Python's own library.
      out: where to write. quick: a tiny policy and a few steps, to see that it runs.
    """

    run: tyro.conf.Positional[Path]
    train_minutes: float = 60
    pieces: int = 64
    library: Path | None = None
    out: Path | None = None
    quick: bool = False


def bits_per_byte(policy: Decoder, params: Any, pieces: np.ndarray) -> np.ndarray:
    """Return the loss of every token but the first, in bits.

    Args:
      pieces: `[N, T + 1]` int32.
    Returns:
      `[N, T]` float64.
    """
    found = [
        text_model.held_out_losses(policy, params, pieces[start : start + ROWS])
        for start in range(0, len(pieces), ROWS)
    ]
    return np.concatenate([np.asarray(x, np.float64) for x in found]) / math.log(2)


def by_context(
    policy: Decoder, params: Any, corpus: Corpus, count: int, contexts: Sequence[int]
) -> list[dict[str, Any]]:
    """Return losses on held-out pieces for each context, longest last.

    Every context is told on about as many bytes.
    """
    found = []
    longest = max(contexts)
    long_pieces = held_out_pieces(corpus, count, longest)
    last = min(LAST, min(contexts))
    for context in contexts:
        pieces = held_out_pieces(corpus, count * longest // context, context)
        bits = bits_per_byte(policy, params, pieces)
        edges = [edge for edge in EDGES if edge < context] + [context]
        same = bits_per_byte(policy, params, long_pieces[:, -context - 1 :])
        apart = bits.mean(axis=1)
        found.append(
            {
                "context": context,
                "rows": len(pieces),
                "bits": float(bits.mean()),
                "error": float(apart.std() / math.sqrt(len(apart))),
                "by_position": {
                    str(first): float(bits[:, first:end].mean())
                    for first, end in itertools.pairwise(edges)
                },
                "last_bytes": last,
                "bits_of_last": float(same[:, -last:].mean()),
            }
        )
    return found


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows: bits per byte."""
    edges = list(points[-1]["by_position"])
    rows: list[tuple[Any, ...]] = [
        (
            p["context"],
            p["rows"],
            p["bits"],
            p["error"],
            *(p["by_position"].get(edge) for edge in edges),
            p["bits_of_last"],
        )
        for p in points
    ]
    header = (
        "context", "pieces", "bits/byte", "±", *(f"from {edge}" for edge in edges),
        f"the same last {points[-1]['last_bytes']}",
    )  # fmt: skip
    return header, rows


def summary(record: Mapping[str, Any]) -> str:
    """Return how the policy was trained, in a sentence."""
    point = record["points"][-1]
    params, seen, of = (
        point[name] / 1e6 for name in ("num_params", "trained_tokens", "corpus_tokens")
    )
    return (
        f"{params:.2f} million parameters, {point['dtype']}, trained for "
        f"{point['train_s'] / 60:.0f} minutes on {seen:.1f} of {of:.1f} million bytes "
        f"in {point['steps']} steps; {point['held_out_files']} files held out:"
    )


def main(args: Args) -> dict[str, Any]:
    """Train, evaluate, print and write the record; return it."""
    corpus = load_corpus(args.library)
    policy, recipe = Decoder(MODEL), Recipe(minutes=args.train_minutes)
    contexts: tuple[int, ...] = (512, 2048)
    if args.quick:
        tiny = dataclasses.replace(MODEL, dim=32, num_layers=1, hidden_dim=64)
        policy = Decoder(tiny)
        stages = (Stage(0.5, 32, 2), Stage(0.5, 64, 1))
        recipe = Recipe(minutes=0.02, stages=stages)
        contexts = (32, 64)
    done = text_model.train(args.run, corpus.train, policy=policy, recipe=recipe)
    out = records.results_dir(args.out, args.quick)
    record = records.new_record("text", records.settings_of(args, "run", "library"))
    record["recipe"] = dataclasses.asdict(recipe)
    count = 2 if args.quick else args.pieces
    for point in by_context(policy, done.params, corpus, count, contexts):
        told = {
            "preset": "text",
            "dtype": policy.config.dtype,
            "num_params": presets.num_params(done.params),
            "train_s": done.seconds,
            "trained_tokens": done.tokens,
            "steps": done.step,
            "corpus_tokens": len(corpus.train),
            "held_out_files": len(corpus.held_out),
        }
        record["points"].append({**told, **point})
    records.save(out / "text.json", record)
    print(summary(record), tables.text(rows_of(record["points"])), sep="\n")
    print(f"written: text.json in {out.name}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.text"))
