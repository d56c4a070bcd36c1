"""The command `er-jax`: answers that need no training run.

er-jax calibrate                 where speculation pays on this device
er-jax sweep FILE.csv ...        how well costs are predicted, on a latency sweep
er-jax replay FILE.csv           controllers on a trace of lengths, without a device
er-jax plan --model M --device D whether a model fits on a device that is not here
er-jax rollout --model DIR       completions of prompts, as text

An error that the user can mend (an argument, a file, a missing extra) ends in one line
and exit code 1, an unknown option in exit code 2; an error of the library keeps its
traceback. Arguments are checked where they are used, and also here before anything that
takes long, such as reading a checkpoint or compiling.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from er_jax.acceptance import AcceptRule
from er_jax.arguments import check_chance, check_gammas, check_whole
from er_jax.config import RolloutConfig
from er_jax.control.estimate import PRIOR_KEEP
from er_jax.costs.passes import PassCosts
from er_jax.costs.roofline import Roofline
from er_jax.drafter import DrafterConfig
from er_jax.io import hf_weights
from er_jax.io.peft import load_peft_adapter
from er_jax.io.text import load_tokenizer
from er_jax.result import Completion, RolloutError
from er_jax.rollout import rollout
from er_jax.tools import plan, presets, replay, sweep, traces
from er_jax.tools.calibrate import Calibrate
from er_jax.tools.deciders import RoundCosts, SpanCosts
from er_jax.tools.outputs import check_output, with_directory

Dtype = Literal["float32", "bfloat16", "float64"]


# Most replays of one command; their outcomes are kept in memory.
MOST_SEEDS = 10_000

# Most completions of one command; they are kept until they are printed.
MOST_COMPLETIONS = 2**20

# Largest seed: JAX takes 32 bits, so a larger one would equal another.
MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Judge the cost table and the roofline on latency sweeps.

    Fits both to all cells of each sweep, and to each half of a checkerboard to judge
    them on the other half. Prints their errors, and the cells whose sign they miss.

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
      costs: a latency sweep (CSV), or a file of `er-jax calibrate` (JSON); the cost
        table is fitted to it, and the roofline of the published rule.
      trace: kind of generated lengths, or a JSONL file of {"length": ...}.
      num: completions of a generated trace.
      cap: limit of a generated completion, in tokens.
      slots: rows decoded at once; all if not given.
      keep: chance that a draft is kept.
      window: last positions that drafts see; all if not given. The published rule
        decides as if they saw all.
      head: first positions that drafts see where they see a window.
      controls: any of fixed:N, paper, best, oracle; ar is always there.
      gammas: draft lengths that best and oracle may choose from.
      seeds: number of generated traces, or of replays of a file with other draws of
        kept drafts.
      plot: file to save a picture of the first rollout in.
    """

    costs: tyro.conf.Positional[Path]
    trace: Literal["tail", "capped", "mixture"] | Path = "tail"
    num: int = 128
    cap: int = 8192
    slots: int | None = None
    keep: float = 0.95
    window: int | None = None
    head: int = 64
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
        drafter = DrafterConfig(window=self.window, head=self.head)
        measured = replay.read_costs(self.costs)
        costs: RoundCosts = PassCosts(measured)
        for span in drafter.spans:
            costs = costs if span is None else SpanCosts(costs, span)
        if isinstance(self.trace, Path):
            found = [traces.Trace.load(self.trace)] * self.seeds
        else:
            make = traces.TRACES[self.trace]
            found = [make(self.num, cap=self.cap, seed=i) for i in range(self.seeds)]
        comparison = replay.compare(
            found,
            costs,
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
            + (f"; drafts see {self.head} + {self.window}" if self.window else "")
        )
        print(comparison.summary())
        if self.plot is not None:
            comparison.plot(with_directory(self.plot))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a model's windows for a device that is not present.

    Prints the bytes on each device, whether they fit, the most slots that fit,
    collectives per round, bytes of each pass, and the speed-up that follows. No weights
    are read.

    Args:
      model: directory of a Hugging Face checkpoint (its config.json is enough), or one
        of the presets: qwen2.5-7b, qwen2.5-14b, llama-3.1-8b, llama-3.1-70b,
        qwen3-0.6b, -1.7b, -4b, -8b, -14b, -32b.
      device: a TPU slice such as v5e:2x4, v5p:2x2x1 or v6e:2x2; a100, h100, h200, or
        several of them such as h100:8; or cpu.
      slots: rows on all devices together.
      max_length: cache positions of each row.
      drafter: how the draft is quantized.
      dtype: of the parameters; None is the checkpoint's own.
      gammas: draft lengths of the programs to compile.
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
        # Nothing runs, so the process must not claim an accelerator.
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
      prompt: message of a user; give several to sample them together.
      num: completions of each prompt.
      max_new_tokens: limit of each completion.
      temperature: 0 is greedy.
      top_p: 1 is off.
      control: how draft lengths are chosen.
      seed: of the noise; the same seed gives the same completions.
      dtype: of the parameters; None is the checkpoint's own.
      adapter: directory of a low-rank adapter in PEFT's format.
      out: JSONL file for prompts, completions and log-probabilities.
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
    adapter: Path | None = None
    out: Path | None = None
    profile: Path | None = None

    def run(self) -> None:
        """Sample, print texts and summary, and save the completions."""
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
        if self.adapter is not None:
            params = load_peft_adapter(self.adapter, policy, params)
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
            self._print_and_save(tokenizer, getattr(error, "completions", {}))
            raise
        rows = zip(
            found.completion_ids, found.logprobs, found.lengths, found.finish_reason,
            strict=True,
        )  # fmt: skip
        self._print_and_save(
            tokenizer,
            {
                row: Completion(ids[:length], logprobs[:length], str(reason))
                for row, (ids, logprobs, length, reason) in enumerate(rows)
            },
        )
        print(found.stats.summary())

    def _print_and_save(
        self, tokenizer: Any, completions: Mapping[int, Completion]
    ) -> None:
        """Print and save completions: all, or those finished before a failure."""
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
            with_directory(self.out).write_text(
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
    """Return one line about an error that the user can mend; None for others."""
    if isinstance(error, OSError) and error.filename is not None:
        remedy = "make room, or " if error.errno == errno.ENOSPC else ""
        text = f"{error.filename}: {error.strerror}; {remedy}give another path"
    elif isinstance(error, MemoryError):
        text = f"out of memory ({str(error) or 'of this host'}); choose smaller sizes"
    elif isinstance(error, ImportError) and error.name is not None:
        return None  # A broken import, not the library's message about an extra.
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
