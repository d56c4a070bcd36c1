"""The command `er-jax`: what the library can say without a training run.

er-jax calibrate                 where speculation pays on this device
er-jax sweep FILE.csv ...        how well costs are predicted, on a latency sweep
er-jax replay FILE.csv           controllers on a trace of lengths, without a device
er-jax plan --model M --device D whether a model fits on a device that is not here
er-jax rollout --model DIR       completions of prompts, as text
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from er_jax import calibrate, hf, plan, replay, sweep
from er_jax.acceptance import AcceptRule
from er_jax.control import DEFAULT_GAMMAS, PRIOR_KEEP
from er_jax.costs import LatencyTable
from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import DrafterConfig
from er_jax.engine import Engine
from er_jax.pass_costs import Cell, PassCosts, Roofline
from er_jax.rollout import RolloutConfig, rollout
from er_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Measure on this device where speculation pays, for a decoder of given sizes.

    Costs depend on sizes and not on values, so the parameters are random. Rollouts of
    such a policy, under the same acceptance rule and with such a draft, begin with what
    was measured.

    Args:
      decoder: sizes of the built-in decoder.
      drafter: how its draft is quantized.
      slots: most rows of a batch. max_length: longest cache, tokens.
      gammas: draft lengths. accept: acceptance rule.
      keep: chance that a draft is kept, for the speed-up.
      budget: seconds of measuring, compilation not counted.
      out: where to save the readings as well (JSON). plot: where to save a picture.
    """

    decoder: DecoderConfig
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    slots: int = 64
    max_length: int = 1024
    gammas: tuple[int, ...] = DEFAULT_GAMMAS
    accept: AcceptRule = "coupled"
    keep: float = PRIOR_KEEP
    budget: float = 20.0
    out: Path | None = None
    plot: Path | None = None

    def run(self) -> None:
        """Measure, print a table, and save what was asked for."""
        if self.slots < 1 or self.max_length < 64:
            raise ValueError(
                f"slots={self.slots} must be at least 1 and max_length="
                f"{self.max_length} at least 64"
            )
        policy = Decoder(self.decoder)
        params = policy.init(jax.random.key(0))
        engine = Engine(policy, self.accept)
        pair = engine.attach_draft(params, self.drafter)
        rows = [1 << i for i in range(self.slots.bit_length()) if 1 << i < self.slots]
        rows.append(self.slots)
        lengths = sorted({max(self.max_length >> i, 64) for i in range(3)})
        found = calibrate.survey_engine(
            engine,
            pair,
            rows,
            lengths,
            self.gammas,
            keep_prob=self.keep,
            budget_s=self.budget,
            progress=sys.stderr.isatty(),
        )
        about = calibrate.conditions(engine, pair)
        print(
            f"{about['device']}, jax {about['jax']}: {len(found.costs.readings)} "
            f"readings in {found.spent_s:.1f} s, {engine.compile_s:.1f} s of compiling "
            f"apart; {'complete' if found.is_complete else 'the time was spent first'}"
        )
        gammas = ", ".join(str(gamma) for gamma in found.costs.gammas("round"))
        print(
            f"speed-up of drafts of {gammas} where {self.keep} are kept, by rows and "
            "cache length"
        )
        print("".join([f"{'':>8}", *(f"{length:>8}" for length in lengths)]))
        for r in rows:
            cells = [Cell(r, length) for length in lengths]
            ups = [calibrate.speed_up(found.costs, cell, self.keep) for cell in cells]
            print("".join([f"{r:>8}", *(f"{up:>8.2f}" for up in ups)]))
        kept = calibrate.cache_path(about)
        for path in (kept, self.out):
            if path is not None:
                LatencyTable(passes=found.costs).save(path, about)
        if kept is not None:
            print(f"kept for rollouts of such a policy in {kept}")
        if self.plot is not None:
            calibrate.plot_speed_up(found, rows, lengths, self.keep, self.plot)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Judge the cost table and the roofline on latency sweeps.

    Fits both to all cells of each sweep, and to each half of a checkerboard to be
    judged on the other, and prints their errors and what they get wrong.

    Args:
      files: CSV files of single passes, in the format that EfficientRollout publishes.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]

    def run(self) -> None:
        """Print a report for each file."""
        if not self.files:
            raise ValueError("files is empty; give at least one latency sweep (CSV)")
        for file in self.files:
            print(sweep.report(sweep.read_sweep(file)))


@dataclasses.dataclass(frozen=True)
class Replay:
    """Replay controllers on traces of lengths and a cost table; no device is needed.

    Args:
      costs: a latency sweep (CSV), or what `er-jax calibrate` saved (JSON); the table
        is fitted to it, and the roofline by which the published rule decides.
      trace: kind of generated lengths, or a JSONL file of {"length": ...}.
      num: completions of a generated trace. cap: their limit, tokens.
      slots: rows decoded at once; all if not given.
      keep: chance that a draft is kept.
      controls: any of fixed:N, paper, best, oracle; ar is always there.
      gammas: what best and oracle may choose from.
      seeds: generated traces, or repeats of a file's with other luck.
      plot: where to save a picture of the first rollout.
    """

    costs: tyro.conf.Positional[Path]
    trace: Literal["tail", "capped", "mixture"] | Path = "tail"
    num: int = 128
    cap: int = 8192
    slots: int | None = None
    keep: float = 0.95
    controls: tuple[str, ...] = ("paper", "best", "oracle")
    gammas: tuple[int, ...] = tuple(range(13))
    seeds: int = 20
    plot: Path | None = None

    def run(self) -> None:
        """Print the comparison and save the picture."""
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a chance, from 0 to 1")
        if min(self.num, self.cap, self.seeds) < 1:
            raise ValueError(
                f"num={self.num}, cap={self.cap} and seeds={self.seeds} must be at "
                "least 1"
            )
        if self.costs.suffix == ".json":
            measured = LatencyTable.load(self.costs).readings()
        else:
            measured = sweep.read_sweep(self.costs).fitted()
        if isinstance(self.trace, Path):
            traces = [replay.Trace.load(self.trace)] * self.seeds
        else:
            make = replay.TRACES[self.trace]
            traces = [make(self.num, cap=self.cap, seed=i) for i in range(self.seeds)]
        comparison = replay.compare(
            traces,
            PassCosts(measured),
            Roofline.fit(measured),
            self.controls,
            gammas=self.gammas,
            keep_prob=self.keep,
            slots=self.slots,
            progress=sys.stderr.isatty(),
        )
        print(
            f"{self.trace}: {len(traces)} rollouts of {len(traces[0].lengths)} "
            f"completions, mean length {traces[0].lengths.mean():.0f}, longest "
            f"{traces[0].lengths.max()}; keep {self.keep}"
        )
        print(comparison.summary())
        if self.plot is not None:
            comparison.plot(self.plot)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a model's windows for a device that is not here, and count.

    Prints bytes of each device, whether they fit, the most slots that do, collectives
    per round, and what speculation is worth by the roofline. No weights are read.

    Args:
      model: directory of a Hugging Face checkpoint (its config.json is enough), or one
        of the presets: qwen2.5-7b, qwen2.5-14b, llama-3.1-8b, llama-3.1-70b,
        qwen3-0.6b, -1.7b, -4b, -8b, -14b, -32b.
      device: a TPU slice such as v5e:2x4, v5p:2x2x1 or v6e:2x2; a100, h100, h200, or
        several of them such as h100:8; or cpu.
      slots: rows over all devices. max_length: cache positions of each.
      drafter: how the draft is quantized. dtype: of the parameters; None is the
        checkpoint's own. gammas: programs to compile. accept: acceptance rule.
      model_parallel: devices that share a copy of the weights; None is the fewest.
      keep: chance that a draft is kept, for the speed-up.
    """

    model: str
    device: str
    slots: int = 64
    max_length: int = 4096
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    dtype: str | None = None
    gammas: tuple[int, ...] = (0, 4)
    accept: AcceptRule = "coupled"
    model_parallel: int | None = None
    keep: float = PRIOR_KEEP

    def run(self) -> None:
        """Compile and print."""
        # Nothing runs here: without this, a process with an accelerator would take it.
        jax.config.update("jax_platforms", "cpu")
        if self.model in plan.PRESETS:
            config = plan.PRESETS[self.model]
            if self.dtype is not None:
                config = dataclasses.replace(config, dtype=self.dtype)
        else:
            config = hf.policy_of(self.model, self.dtype).config
        found = plan.plan(
            config,
            plan.target_of(self.device),
            slots=self.slots,
            max_length=self.max_length,
            gammas=self.gammas,
            drafter=self.drafter,
            accept=self.accept,
            model=self.model_parallel,
            keep=self.keep,
        )
        print(f"{self.model} on {found.summary()}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample completions of prompts from a Hugging Face checkpoint, as text.

    Args:
      model: directory of the checkpoint, its tokenizer included.
      prompt: what a user says; give several to sample them together.
      num: completions of each. max_new_tokens: limit of each.
      temperature: 0 is greedy. top_p: 1 is off. control: how draft lengths are chosen.
      seed: of the noise; the same seed gives the same completions. dtype: of the
        parameters; None is the checkpoint's own.
      out: JSONL for prompts, completions and their log-probabilities.
      profile: directory for a trace of the device, for XProf or Perfetto.
    """

    model: Path
    prompt: tuple[str, ...]
    num: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    control: str = "best"
    seed: int = 0
    dtype: str | None = None
    out: Path | None = None
    profile: Path | None = None

    def run(self) -> None:
        """Sample, print the texts and the summary, and save what was asked for."""
        tokenizer = load_tokenizer(self.model)
        policy, params = hf.load_hf(self.model, dtype=self.dtype, progress=True)
        found = rollout(
            policy,
            params,
            [tokenizer.encode_prompt(text) for text in self.prompt],
            key=jax.random.key(self.seed),
            config=RolloutConfig(
                max_new_tokens=self.max_new_tokens,
                n=self.num,
                temperature=self.temperature,
                top_p=self.top_p,
                stop_token_ids=tokenizer.stop_token_ids,
                control=self.control,
            ),
            progress=sys.stderr.isatty(),
            profile=self.profile,
        )
        lines = []
        for row, length in enumerate(found.lengths.tolist()):
            lines.append(
                {
                    "prompt": self.prompt[row // self.num],
                    "completion": tokenizer.decode(found.completion_ids[row, :length]),
                    "finish_reason": str(found.finish_reason[row]),
                    "logprobs": found.logprobs[row, :length].tolist(),
                }
            )
            print(f"> {lines[-1]['prompt']}\n{lines[-1]['completion']}\n")
        print(found.stats.summary())
        if self.out is not None:
            self.out.write_text(
                "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
            )


Command = (
    Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Sample, tyro.conf.subcommand("rollout")]
)


def main() -> None:
    """Run the command line."""
    command: Calibrate | Sweep | Replay | Plan | Sample
    command = tyro.cli(Command, prog="er-jax")  # type: ignore[arg-type]
    try:
        command.run()
    except (ValueError, ImportError) as error:
        raise SystemExit(f"er-jax: {error}") from error


if __name__ == "__main__":
    main()
