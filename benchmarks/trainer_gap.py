"""How far the trainer's log-probabilities are from the rollout's, in four precisions.

    python -m benchmarks.trainer_gap RUN

A policy trained by `train.grpo` samples its held-out prompts, and `er_jax.score`
computes the log-probabilities of the same tokens under the same parameters, over whole
sequences. Programs of other shape round differently; nothing else differs. Body and
vocabulary projection are in float32 or bfloat16; in bfloat16 the logits are rounded to
it as well, as models in bfloat16 commonly do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import er_jax
from benchmarks.lib import presets, records, tables, trained
from train.losses import AGREED

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure.

    Args:
      run: directory of a run of `train.grpo`. step: its checkpoint; 0 is the policy
        after the warm-up.
      n: completions of each prompt. length: most tokens of one.
      rows: decoded at once.
      out: where to write. quick: an untrained tiny policy instead, a few tokens.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    step: int = 0
    n: int = 4
    length: int = 256
    rows: int = 64
    out: Path | None = None
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Projecting(er_jax.Decoder):
    """A decoder with its vocabulary projection in another dtype than its body.

    projection: dtype of its factors and of the logits before they are widened.
    """

    projection: str = "float32"

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Project to logits `[B, T, V]`, float32."""
        dtype = jnp.dtype(self.projection)
        head = params["lm_head"].astype(dtype)
        logits = er_jax.dot(hidden.astype(dtype), head, out_dtype=dtype)
        return logits.astype(jnp.float32)


def in_precision(
    policy: er_jax.Decoder, params: Any, dtype: str, projection: str
) -> tuple[Projecting, Any]:
    """Return a policy and its float32 parameters in other precisions."""
    config = dataclasses.replace(policy.config, dtype=dtype)
    body = jax.tree.map(lambda x: x.astype(dtype), params)
    head = params["lm_head"].astype(projection)
    return Projecting(config, projection=projection), body | {"lm_head": head}


def point_of(
    policy: Projecting, params: Any, prompts: Sequence[Sequence[int]], args: Args
) -> dict[str, Any]:
    """Sample, score and compare in one precision."""
    stop_ids = () if args.quick else (trained.STOP_ID,)
    config = er_jax.RolloutConfig(
        max_new_tokens=args.length, n=args.n, stop_token_ids=stop_ids, control="ar",
        max_slots=args.rows,
    )  # fmt: skip
    out = er_jax.rollout(policy, params, prompts, key=jax.random.key(0), config=config)
    found = np.asarray(er_jax.score(policy, params, out, config=config).logprobs)
    gaps = (found - out.logprobs)[out.completion_mask]
    ratios = np.exp(gaps)
    return {
        "preset": "tiny, untrained" if args.quick else "demo, warmed up",
        "rows": args.rows,
        "dtype": policy.config.dtype,
        "projection": policy.projection,
        "num_tokens": len(gaps),
        "largest": np.abs(gaps).max(),
        "mean": np.abs(gaps).mean(),
        "outside_share": np.mean((ratios < AGREED[0]) | (ratios > AGREED[1])),
    }


def rows_of(points: Sequence[Any]) -> tables.Table:
    """Return header and rows of the table."""
    header = (
        "policy", "body", "projection", "tokens", "largest, nats", "mean, nats",
        "outside of [{}, {}] %".format(*AGREED),
    )  # fmt: skip
    rows = [
        (
            p["preset"],
            p["dtype"],
            p["projection"],
            p["num_tokens"],
            f"{p['largest']:.1e}",
            f"{p['mean']:.1e}",
            round(100 * p["outside_share"], 2),
        )
        for p in points
    ]
    return header, rows


def main(args: Args) -> dict[str, Any]:
    """Measure, print a table, write and return the record."""
    policy: er_jax.Decoder
    if args.quick:
        args = dataclasses.replace(args, n=1, length=8, rows=4)
        policy = presets.decoder("tiny", dtype="float32")
        params, prompts = policy.init(jax.random.key(0)), [[1, 2, 3], [4]]
    elif args.run is None:
        raise SystemExit("give the directory of a run of train.grpo")
    else:
        run = trained.load_run(args.run, step=args.step)
        policy, params, prompts = run.policy, run.params, run.prompts
    record = records.new_record("trainer_gap", records.settings_of(args, "run"))
    out = records.results_dir(args.out, quick=args.quick)
    make = functools.partial(in_precision, policy, params)
    for dtype in DTYPES:
        for projection in DTYPES:
            record["points"].append(point_of(*make(dtype, projection), prompts, args))
            records.save(out / "trainer_gap.json", record)
    print(tables.text(rows_of(record["points"])))
    return record


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, prog="python -m benchmarks.trainer_gap"))
