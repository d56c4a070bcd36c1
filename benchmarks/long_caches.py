"""Drafts that see a window of a long cache: rollouts beside whole drafts and none.

    python -m benchmarks.long_caches                 # 90M, random parameters
    python -m benchmarks.long_caches --text RUN      # and a trained text model

One prompt, as many completions as rows, all equally long: the cache is long from the
first round. Controls are run in turn in one process, warmed up, compilation apart; the
seconds are those of decoding, without the prefill, which is the same for all. All
controls must sample the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import er_jax
from benchmarks.lib import measure, presets, records, tables
from benchmarks.lib.text_model import load_text_model
from er_jax import DrafterConfig, Rollout, RolloutConfig

GAMMAS = (0, 2, 4, 6)
CONTROLS = ("ar", "all positions", "window", "best")
# Of what attention adds with random parameters; see `looking_back_little`.
ATTENTION_SHARE = 0.1

# Rows, and positions of the prompt.
SIZES = ((4, 1900), (4, 3900), (16, 1900))


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run.

    Args:
      text: directory of a training by `benchmarks.text`, measured as well.
      sizes: rows and positions of the prompt. gamma: drafts of the fixed controls.
      window, head: what their drafts see in the control "window".
      new_tokens: of every completion. repeats: readings of each control.
      quick: one tiny size, to check the script. out: directory of the record.
    """

    text: Path | None = None
    sizes: tuple[tuple[int, int], ...] = SIZES
    gamma: int = 4
    window: int = 256
    head: int = 64
    new_tokens: int = 64
    repeats: int = 5
    quick: bool = False
    out: Path | None = None


class Subject:
    """A policy at one size, with a controller for each control."""

    def __init__(
        self, policy: er_jax.Decoder, params: Any, prompt: list[int], rows: int,
        args: Args,
    ) -> None:  # fmt: skip
        self.policy, self.prompt, self.rows, self.args = policy, prompt, rows, args
        draft = jax.jit(functools.partial(er_jax.attach_draft, config=DrafterConfig()))
        self.params = draft(params)
        self.stats: dict[str, er_jax.RolloutStats] = {}
        self.tokens: dict[str, np.ndarray] = {}
        self._controllers: dict[str, er_jax.Controller] = {}

    def config(self, name: str) -> RolloutConfig:
        """Return the settings of a control."""
        args = self.args
        control = {"ar": "ar", "best": "best"}.get(name, f"fixed:{args.gamma}")
        window: Any = {"window": args.window, "best": "auto"}.get(name)
        return RolloutConfig(
            max_new_tokens=args.new_tokens, n=self.rows, max_slots=self.rows,
            control=control, gammas=GAMMAS,
            drafter=DrafterConfig(window=window, head=args.head),
        )  # fmt: skip

    def run(self, name: str) -> float:
        """Sample once under a control; return the seconds of its windows."""
        config = self.config(name)
        made = er_jax.Controller(config.control, config.gammas)
        out: Rollout = er_jax.rollout(
            self.policy, self.params, [self.prompt], key=jax.random.key(0),
            config=config, controller=self._controllers.setdefault(name, made),
        )  # fmt: skip
        self.stats[name], self.tokens[name] = out.stats, out.completion_ids
        return out.stats.seconds["windows"]

    def point(self, preset: str) -> dict[str, Any]:
        """Run all controls in turn; return the record's point."""
        for name in CONTROLS:
            # "best" learns costs and acceptance, and compiles what it wants.
            for _ in range(6 if name == "best" else 2):
                self.run(name)
        readings = measure.interleave(
            {name: functools.partial(self.run, name) for name in CONTROLS},
            self.args.repeats,
            desc=f"{preset}, {self.rows} rows",
        )
        tokens = self.rows * self.args.new_tokens
        controls = []
        for name in CONTROLS:
            stats, plain = self.stats[name], self.tokens["ar"]
            differ = (self.tokens[name] != plain).any(axis=1).sum()
            timeline = stats.timeline
            controls.append(
                {
                    "control": name,
                    "seconds": measure.spread(readings[name]),
                    "tokens_per_s": tokens / np.median(readings[name]),
                    "over_ar": measure.paired_ratio(readings["ar"], readings[name]),
                    "over_all": measure.paired_ratio(
                        readings["all positions"], readings[name]
                    ),
                    "kept": stats.keep_rate(self.args.gamma),
                    "host_share": stats.seconds["host"] / stats.total_s,
                    "gammas": sorted({m.gamma for m in timeline}),
                    "windows": sorted({m.window for m in timeline if m.gamma}),
                    "num_sequences_that_differ": int(differ),
                }
            )
        return {
            "preset": preset,
            "rows": self.rows,
            "dtype": self.policy.config.dtype,
            "cache_length": timeline[-1].cache_length,
            "new_tokens": self.args.new_tokens,
            "gamma": self.args.gamma,
            "head": self.args.head,
            "window": self.args.window,
            "controls": controls,
        }


def looking_back_little(params: Any) -> Any:
    """Return random parameters whose attention adds little to the residual stream.

    Random attention looks at all positions alike, so a window would hide most of what
    it adds, and trained attention does not. With a tenth of it, drafts with a window
    are kept about as often as a trained policy's; every pass costs the same.
    """
    layers = [
        {**layer, "o_proj": layer["o_proj"] * ATTENTION_SHARE}
        for layer in params["layers"]
    ]
    return {**params, "layers": layers}


def rows_of(points: Sequence[Mapping[str, Any]]) -> tables.Table:
    """Return header and rows of the table: a line for every size and control."""
    rows: list[tuple[Any, ...]] = []
    for p in points:
        for c in p["controls"]:
            seconds = c["seconds"]
            name = c["control"]
            if name == "window":
                name += f" {p['head']} + {p['window']}"
            if name == "best":
                seen = ", ".join(str(w or "all") for w in c["windows"]) or "no drafts"
                name += f" (windows: {seen})"
            median = tables.number(seconds["median"])
            rows.append(
                (
                    p["preset"], f"{p['rows']} x {p['cache_length']}", name,
                    f"{median} ({measure.iqr_percent(seconds):.0f})",
                    c["tokens_per_s"], c["over_ar"]["median"],
                    c["over_all"]["median"], c["kept"], 100 * c["host_share"],
                    c["num_sequences_that_differ"],
                )
            )  # fmt: skip
    header = (
        "decoder", "rows x positions", "control", "s (IQR %)", "tokens/s", "speed / ar",
        "speed / all positions", "kept", "host %", "differ",
    )  # fmt: skip
    return header, rows


def main(args: Args) -> None:
    """Measure all sizes, print the table and write the record."""
    preset = "tiny" if args.quick else "90M"
    sizes = ((2, 150),) if args.quick else args.sizes
    if args.quick:
        args = dataclasses.replace(args, window=20, head=4, new_tokens=8, repeats=2)
    record = records.new_record("long_caches", records.settings_of(args, "text"))
    directory = records.results_dir(args.out, args.quick)
    random = np.random.default_rng(0)
    for rows, length in sizes:
        policy = er_jax.Decoder(presets.PRESETS[preset])
        params = looking_back_little(policy.init(jax.random.key(0)))
        prompt = random.integers(0, policy.vocab_size, length).tolist()
        record["points"].append(
            Subject(policy, params, prompt, rows, args).point(preset)
        )
        records.save(directory / "long_caches.json", record)
    if args.text is not None:
        policy, params, _ = load_text_model(args.text)
        # Held-out text of its own kind: this file's interpreter has it.
        source = Path(dataclasses.__file__).read_bytes()
        for rows, length in sizes:
            prompt = list(source[:length])
            record["points"].append(
                Subject(policy, params, prompt, rows, args).point("text")
            )
            records.save(directory / "long_caches.json", record)
    print(tables.markdown(rows_of(record["points"])))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.long_caches"))
