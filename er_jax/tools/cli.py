"""The command `er-jax`: what the library can say without a training run.

er-jax calibrate                 where speculation pays on this device
er-jax sweep FILE.csv ...        how well costs are predicted, on a latency sweep
er-jax replay FILE.csv           controllers on a trace of lengths, without a device
er-jax plan --model M --device D whether a model fits on a device that is not here
er-jax rollout --model DIR       completions of prompts, as text

What a user can mend (an argument, a file, an extra that is not installed) ends in one
line and exit code 1, an unknown option in exit code 2; a mistake of the library keeps
its traceback. Arguments are checked where they are used, and here before what takes
long: a checkpoint is read, programs are compiled.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from er_jax.acceptance import AcceptRule
from er_jax.arguments import check_chance, check_gammas, check_number, check_whole
from er_jax.config import DEFAULT_GAMMAS, RolloutConfig
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs import store
from er_jax.costs.passes import Cell, PassCosts
from er_jax.costs.roofline import Roofline
from er_jax.costs.table import LatencyTable
from er_jax.decoder import Decoder, DecoderConfig
from er_jax.devices import device_bytes, device_memory_bytes
from er_jax.drafter import DrafterConfig
from er_jax.engine.engine import Engine
from er_jax.figures import check_picture
from er_jax.io import hf_weights
from er_jax.io.text import load_tokenizer
from er_jax.result import Completion, RolloutError
from er_jax.rollout import rollout
from er_jax.tools import plan, presets, replay, survey, sweep, traces

Dtype = Literal["float32", "bfloat16", "float64"]


# Positions of the shortest cache that is surveyed.
SHORTEST = 64

# Replays of one command: each is a rollout of its own, kept in memory.
MOST_SEEDS = 10_000

# Completions of one command: all are kept until they are printed.
MOST_COMPLETIONS = 2**20

# Any more would be cut to 32 bits, and be the same seed as another.
MOST_SEED = 2**32 - 1


def check_output(name: str, path: Path | None, *, is_picture: bool = False) -> None:
    """Refuse a file that cannot be written, before there is anything to write.

    Args:
      name: of the argument that gives the path. is_picture: drawn by matplotlib.
    Raises:
      ValueError: a directory, a place where none can be written, no kind of picture.
      ImportError: matplotlib is missing; install the extra `plot`.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}={path} is a directory; give a file in it")
    place = path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"{name}={path} cannot be written in {place}; give a path in a directory "
            "that can be"
        )
    if is_picture:
        check_picture(name, path)


def _with_place(path: Path) -> Path:
    """Return the path, its directory made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Measure on this device where speculation pays, for a decoder of given sizes.

    Costs depend on sizes and not on values, so the parameters are random. Rollouts of
    such a policy, under the same acceptance rule and with such a draft, begin with what
    was measured.

    Args:
      decoder: sizes of the built-in decoder.
      drafter: how its draft is quantized.
      slots: most rows of a batch.
      max_length: longest cache, tokens, at least 64.
      gammas: draft lengths, one of them above 0.
      accept: acceptance rule.
      keep: chance that a draft is kept, for the speed-up.
      budget: seconds of measuring, compilation not counted.
      out: where to save the readings as well (JSON).
      plot: where to save a picture.
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
        check_whole("slots", self.slots)
        check_whole("max_length", self.max_length, SHORTEST)
        check_gammas(self.gammas, SHORTEST - 1)
        if not any(self.gammas):
            raise ValueError(
                f"gammas={self.gammas} has no draft to survey; give one above 0"
            )
        check_chance("keep", self.keep)
        check_number("budget", self.budget, 0, math.inf, "seconds")
        check_output("out", self.out)
        check_output("plot", self.plot, is_picture=True)
        policy = Decoder(self.decoder)
        shapes = plan.shapes_of(policy, self.drafter, self.slots, self.max_length)
        needed, there = device_bytes(shapes), device_memory_bytes() or math.inf
        if needed > there:
            raise ValueError(
                f"slots={self.slots}, max_length={self.max_length} and such a decoder "
                f"need {needed / 1e9:.3g} GB, and the device has {there / 1e9:.3g}; "
                "choose less of them"
            )
        params = policy.init(jax.random.key(0))
        engine = Engine(policy, self.accept)
        pair = engine.attach_draft(params, self.drafter)
        rows = [1 << i for i in range(self.slots.bit_length()) if 1 << i < self.slots]
        rows.append(self.slots)
        lengths = sorted({max(self.max_length >> i, SHORTEST) for i in range(3)})
        found = survey.survey_engine(
            engine,
            pair,
            rows,
            lengths,
            self.gammas,
            keep_prob=self.keep,
            budget_s=self.budget,
            progress=sys.stderr.isatty(),
        )
        about = store.conditions(engine, pair)
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
            ups = [survey.speed_up(found.costs, cell, self.keep) for cell in cells]
            print("".join([f"{r:>8}", *(f"{up:>8.2f}" for up in ups)]))
        kept = store.cache_path(about)
        for path in (kept, self.out):
            if path is not None:
                LatencyTable(passes=found.costs).save(path, about)
        if kept is not None:
            print(f"kept for rollouts of such a policy in {kept}")
        if self.plot is not None:
            path = _with_place(self.plot)
            survey.plot_speed_up(found, rows, lengths, self.keep, path)


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
        for found in [sweep.read_sweep(file) for file in self.files]:
            print(sweep.report(found))


@dataclasses.dataclass(frozen=True)
class Replay:
    """Replay controllers on traces of lengths and a cost table; no device is needed.

    Args:
      costs: a latency sweep (CSV), or what `er-jax calibrate` saved (JSON); the table
        is fitted to it, and the roofline by which the published rule decides.
      trace: kind of generated lengths, or a JSONL file of {"length": ...}.
      num: completions of a generated trace.
      cap: limit of each of these, tokens.
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
        check_chance("keep", self.keep)
        check_whole("seeds", self.seeds, 1, MOST_SEEDS)
        if self.slots is not None:
            check_whole("slots", self.slots)
        check_gammas(self.gammas)
        check_output("plot", self.plot, is_picture=True)
        if isinstance(self.trace, Path) and not self.trace.exists():
            raise ValueError(
                f"trace={self.trace} is neither a file nor one of "
                f"{', '.join(traces.TRACES)}"
            )
        measured = replay.read_costs(self.costs)
        if isinstance(self.trace, Path):
            found = [traces.Trace.load(self.trace)] * self.seeds
        else:
            make = traces.TRACES[self.trace]
            found = [make(self.num, cap=self.cap, seed=i) for i in range(self.seeds)]
        comparison = replay.compare(
            found,
            PassCosts(measured),
            Roofline.fit(measured),
            self.controls,
            gammas=self.gammas,
            keep_prob=self.keep,
            slots=self.slots,
            progress=sys.stderr.isatty(),
        )
        print(
            f"{self.trace}: {len(found)} rollouts of {len(found[0].lengths)} "
            f"completions, mean length {found[0].lengths.mean():.0f}, longest "
            f"{found[0].lengths.max()}; keep {self.keep}"
        )
        print(comparison.summary())
        if self.plot is not None:
            comparison.plot(_with_place(self.plot))


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
      slots: rows over all devices.
      max_length: cache positions of each.
      drafter: how the draft is quantized.
      dtype: of the parameters; None is the checkpoint's own.
      gammas: programs to compile.
      accept: acceptance rule.
      model_parallel: devices that share a copy of the weights; None is the fewest.
      keep: chance that a draft is kept, for the speed-up.
    """

    model: str
    device: str
    slots: int = 64
    max_length: int = 4096
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    dtype: Dtype | None = None
    gammas: tuple[int, ...] = (0, 4)
    accept: AcceptRule = "coupled"
    model_parallel: int | None = None
    keep: float = PRIOR_KEEP

    def run(self) -> None:
        """Compile and print."""
        # Nothing runs here: without this, a process with an accelerator would take it.
        jax.config.update("jax_platforms", "cpu")
        if self.model in presets.PRESETS:
            config = presets.PRESETS[self.model]
            if self.dtype is not None:
                config = dataclasses.replace(config, dtype=self.dtype)
        elif not Path(self.model).is_dir():
            raise ValueError(
                f"model={self.model} is neither a directory nor one of "
                f"{', '.join(presets.PRESETS)}"
            )
        else:
            config = hf_weights.policy_of(self.model, self.dtype).config
        found = plan.plan(
            config,
            presets.target_of(self.device),
            slots=self.slots,
            max_length=self.max_length,
            gammas=self.gammas,
            drafter=self.drafter,
            accept=self.accept,
            model_parallel=self.model_parallel,
            keep=self.keep,
        )
        print(f"{self.model} on {found.summary()}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample completions of prompts from a Hugging Face checkpoint, as text.

    Args:
      model: directory of the checkpoint, its tokenizer included.
      prompt: what a user says; give several to sample them together.
      num: completions of each.
      max_new_tokens: limit of each.
      temperature: 0 is greedy.
      top_p: 1 is off.
      control: how draft lengths are chosen.
      seed: of the noise; the same seed gives the same completions.
      dtype: of the parameters; None is the checkpoint's own.
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
    dtype: Dtype | None = None
    out: Path | None = None
    profile: Path | None = None

    def run(self) -> None:
        """Sample, print the texts and the summary, and save what was asked for."""
        if not self.prompt:
            raise ValueError("prompt is empty; give one text or more")
        check_whole("num", self.num, 1, MOST_COMPLETIONS // len(self.prompt))
        check_whole("seed", self.seed, 0, MOST_SEED)
        check_output("out", self.out)
        if self.profile is not None and self.profile.exists():
            if not self.profile.is_dir():
                raise ValueError(f"profile={self.profile} is a file; give a directory")
        config = RolloutConfig(
            max_new_tokens=self.max_new_tokens,
            n=self.num,
            temperature=self.temperature,
            top_p=self.top_p,
            control=self.control,
        )
        tokenizer = load_tokenizer(self.model)
        config = dataclasses.replace(config, stop_token_ids=tokenizer.stop_token_ids)
        policy, params = hf_weights.load_hf(self.model, dtype=self.dtype, progress=True)
        try:
            found = rollout(
                policy,
                params,
                [tokenizer.encode_prompt(text) for text in self.prompt],
                key=jax.random.key(self.seed),
                config=config,
                progress=sys.stderr.isatty(),
                profile=self.profile,
            )
        except (RolloutError, KeyboardInterrupt) as error:
            self._tell(tokenizer, getattr(error, "completions", {}))
            raise
        rows = zip(
            found.completion_ids, found.logprobs, found.lengths, found.finish_reason,
            strict=True,
        )  # fmt: skip
        self._tell(
            tokenizer,
            {
                row: Completion(ids[:length], logprobs[:length], str(reason))
                for row, (ids, logprobs, length, reason) in enumerate(rows)
            },
        )
        print(found.stats.summary())

    def _tell(self, tokenizer: Any, completions: Mapping[int, Completion]) -> None:
        """Print completions and save them, all of them or those that there are."""
        lines = []
        for row, completion in sorted(completions.items()):
            lines.append(
                {
                    "prompt": self.prompt[row // self.num],
                    "completion": tokenizer.decode(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "logprobs": completion.logprobs.tolist(),
                }
            )
            print(f"> {lines[-1]['prompt']}\n{lines[-1]['completion']}\n")
        if self.out is not None:
            _with_place(self.out).write_text(
                "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
            )


Command = (
    Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Sample, tyro.conf.subcommand("rollout")]
)


def complaint(error: Exception) -> str | None:
    """Return, in one line, what a user can mend; None of any other failure."""
    if isinstance(error, OSError) and error.filename is not None:
        remedy = "make room, or " if error.errno == errno.ENOSPC else ""
        text = f"{error.filename}: {error.strerror}; {remedy}give another path"
    elif isinstance(error, MemoryError):
        text = f"out of memory ({str(error) or 'of this host'}); choose smaller sizes"
    elif isinstance(error, ImportError) and error.name is not None:
        return None  # Not the library's own sentence about a missing extra.
    elif isinstance(error, ValueError | OSError | ImportError):
        text = str(error) or type(error).__name__
    else:
        return None
    return " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
      arguments: of the command; None is those of the process.
    Raises:
      SystemExit: 1 with a line for what a user can mend; 2 for an unknown option, a
        missing one or one of another type; 0 after --help.
    """
    command: Calibrate | Sweep | Replay | Plan | Sample
    command = tyro.cli(Command, prog="er-jax", args=arguments)  # type: ignore[arg-type]
    try:
        command.run()
    except Exception as error:
        line = complaint(error)
        if line is None:
            raise
        raise SystemExit(f"er-jax: {line}") from error


if __name__ == "__main__":
    main()
