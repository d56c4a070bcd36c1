"""Rollouts of one tree, one for every line that it reads; see `benchmarks.commits`.

    python worker.py TREE WORKLOADS

It uses nothing of this project but the public calls of the tree's er_jax, because the
tree may be of another commit. WORKLOADS is JSON, name -> sizes, the decoder's among
them. For every name that it reads it runs that rollout and prints seconds, tokens and a
digest as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

# Not the directory of this file: its modules are of another commit.
sys.path[0] = sys.argv[1]

import jax  # noqa: E402
import numpy as np  # noqa: E402

import er_jax  # noqa: E402

# One token in so many ends a completion.
STOP_SHARE = 40


def prepared(sizes: dict[str, Any]) -> Any:
    """Return a function that runs one rollout of a workload."""
    config = er_jax.DecoderConfig(**sizes["decoder"])
    policy = er_jax.Decoder(config)
    params = er_jax.attach_draft(policy.init(jax.random.key(0)), er_jax.DrafterConfig())
    vocab = config.vocab_size
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, 8).tolist() for _ in range(sizes["num"])]
    settings = er_jax.RolloutConfig(
        max_new_tokens=sizes["max_new_tokens"],
        max_slots=sizes["slots"],
        control=sizes["control"],
        stop_token_ids=tuple(range(0, vocab, STOP_SHARE)),
    )
    controller = er_jax.Controller(settings.control, settings.gammas, patience=0.0)
    return lambda: er_jax.rollout(
        policy,
        params,
        prompts,
        key=jax.random.key(1),
        config=settings,
        controller=controller,
    )


def main() -> None:
    """Answer until there is nothing more to read."""
    workloads = {
        name: prepared(sizes) for name, sizes in json.loads(sys.argv[2]).items()
    }
    for line in sys.stdin:
        run = workloads[line.strip()]
        start = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - start
        tokens = hashlib.sha256(np.ascontiguousarray(out.completion_ids).tobytes())
        found = {
            "seconds": seconds - out.stats.seconds["compile"],
            "tokens": int(out.lengths.sum()),
            "digest": tokens.hexdigest(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
