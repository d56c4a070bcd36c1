"""The command line of training: GRPO on verifiable rewards.

    python -m train.grpo arithmetic      # the reported demo, a few minutes on 2 cores
    python -m train.grpo calculator      # the same, with a tool that the policy calls
    python -m train.grpo tiny            # the same in seconds, for trying things out
    python -m train.grpo hf --model DIR --data FILE.jsonl    # a checkpoint, your data

What a run does is in `run`, what a step does in `trainer`, the loss in `losses`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import jax
import tyro

from configs import arithmetic, calculator, hf, tiny
from train.placement import join
from train.run import run


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    config = tyro.extras.overridable_config_cli(
        {
            "arithmetic": ("The reported demo.", arithmetic.CONFIG),
            "calculator": ("The demo with a calculator to call.", calculator.CONFIG),
            "tiny": ("The same in seconds.", tiny.CONFIG),
            "hf": ("A checkpoint and data of yours.", hf.CONFIG),
        },
        args=args,
    )
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    join(config.mesh)
    try:
        run(config)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; --resume --out {config.out} goes on from the last "
            "checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.grpo: {error}") from error


if __name__ == "__main__":
    main()
