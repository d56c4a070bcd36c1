"""One sampler in a process of its own; see `benchmarks.peers`.

    python peer_worker.py ENGINE TASK

TASK is JSON: a checkpoint's directory, prompts, and how to sample. For every seed that
it reads, the engine samples all completions and prints a line of JSON: seconds, tokens
of completions, the row-steps that it computed, and the most memory so far.

Every engine samples rows of a batch at temperature 1 until one of the stop tokens or
the limit. Left out: what is compared, and how often (`benchmarks.peers`).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Not the directory of this file, which has modules of other names.
sys.path[0] = str(Path(__file__).parents[2])

import numpy as np  # noqa: E402

PAD = 0

# An id that no token has.
NEVER = -1


class Sampled(NamedTuple):
    """What one run of an engine gives.

    tokens: of all completions. row_steps: passes over one row, used or not.
    seconds_of_compilation: part of the run.
    """

    tokens: int
    row_steps: int
    seconds_of_compilation: float = 0.0


Sampler = Callable[[int], Sampled]
"""Samples all completions of a task with a seed."""


def batches(task: dict[str, Any]) -> Iterator[list[list[int]]]:
    """Yield the prompts of each batch, every prompt once for each completion."""
    rows = [prompt for prompt in task["prompts"] for _ in range(task["group"])]
    for first in range(0, len(rows), task["slots"]):
        yield rows[first : first + task["slots"]]


def lengths_of(rows: Sequence[Sequence[int]], stops: Sequence[int]) -> list[int]:
    """Return the length of each completion: up to its first stop token, with it."""
    found = []
    for row in rows:
        ends = np.flatnonzero(np.isin(np.asarray(row), stops))
        found.append(int(ends[0]) + 1 if len(ends) else len(row))
    return found


def er_jax_sampler(task: dict[str, Any], control: str) -> Sampler:
    """Return `er_jax.rollout`, with one controller for all runs."""
    import jax

    import er_jax

    policy, params = er_jax.load_hf(task["checkpoint"], dtype="float32")
    params = er_jax.attach_draft(params, er_jax.DrafterConfig())
    config = er_jax.RolloutConfig(
        max_new_tokens=task["max_new_tokens"],
        n=task["group"],
        max_slots=task["slots"],
        stop_token_ids=tuple(task["stops"]),
        control=control,
    )
    controller = er_jax.Controller(control, config.gammas)

    def sample(seed: int) -> Sampled:
        out = er_jax.rollout(
            policy, params, task["prompts"], key=jax.random.key(seed), config=config,
            controller=controller,
        )  # fmt: skip
        steps = sum(w.rows * w.num_rounds for w in out.stats.timeline)
        tokens = int(out.lengths.sum())
        return Sampled(tokens, steps, out.stats.seconds["compile"])

    return sample


class Numbers:
    """A tokenizer whose texts are token ids, with spaces between them."""

    def encode(self, text: str) -> list[int]:
        """Return the ids that a text names."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that names these ids."""
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> int:
        """Return the id of padding: nothing begins a text."""
        return PAD

    def eos_id(self) -> int:
        """Return the id of padding, which no text has."""
        return PAD

    def pad_id(self) -> int:
        """Return the id of padding."""
        return PAD


def tunix_sampler(task: dict[str, Any]) -> Sampler:
    """Return the sampler of Tunix's vanilla engine."""
    import jax
    from tunix.generate import sampler, tokenizer_adapter
    from tunix.models.qwen3 import model, params

    shape = json.loads(Path(task["checkpoint"], "config.json").read_text())
    config = model.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_parameters"]["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        use_tied_embedding=shape["tie_word_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1])[None], ("fsdp", "tp"))
    prompt_length = len(task["prompts"][0])
    with mesh:
        loaded = params.create_model_from_safe_tensors(task["checkpoint"], config, mesh)
    cache = sampler.CacheConfig(
        cache_size=prompt_length + task["max_new_tokens"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    adapter = tokenizer_adapter.TokenizerAdapter(Numbers())
    engine = sampler.Sampler(loaded, adapter, cache)

    def sample(seed: int) -> Sampled:
        tokens = steps = 0
        for number, batch in enumerate(batches(task)):
            with mesh:
                out = engine(
                    [adapter.decode(prompt) for prompt in batch],
                    max_generation_steps=task["max_new_tokens"],
                    max_prompt_length=prompt_length,
                    eos_tokens=task["stops"] or [NEVER],
                    temperature=1.0,
                    top_p=1.0,
                    seed=1000 * seed + number,
                )
            lengths = lengths_of(out.tokens, task["stops"])
            tokens, steps = tokens + sum(lengths), steps + len(batch) * max(lengths)
        return Sampled(tokens, steps)

    return sample


def transformers_sampler(task: dict[str, Any], **options: Any) -> Sampler:
    """Return `generate` of transformers, with more options for it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # It warns of an end that never comes.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task["checkpoint"], dtype="float32"
    ).eval()
    model.generation_config.pad_token_id = PAD
    # Drafts from the prompt are for one row at a time.
    alone = "prompt_lookup_num_tokens" in options

    def sample(seed: int) -> Sampled:
        torch.manual_seed(seed)
        tokens = steps = 0
        for batch in batches(task | {"slots": 1} if alone else task):
            prompts = torch.tensor(batch)
            with torch.inference_mode():
                out = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=task["max_new_tokens"],
                    eos_token_id=task["stops"] or [NEVER],
                    **options,
                )
            completions = out[:, prompts.shape[1] :].numpy()
            lengths = lengths_of(completions, task["stops"])
            tokens, steps = tokens + sum(lengths), steps + len(batch) * max(lengths)
        return Sampled(tokens, steps)

    return sample


ENGINES: dict[str, Callable[[dict[str, Any]], Sampler]] = {
    "er_jax, best": lambda task: er_jax_sampler(task, "best"),
    "er_jax, ar": lambda task: er_jax_sampler(task, "ar"),
    "Tunix": tunix_sampler,
    "transformers": transformers_sampler,
    "transformers, static cache": lambda task: transformers_sampler(
        task, cache_implementation="static"
    ),
    "transformers, lookup": lambda task: transformers_sampler(
        task, prompt_lookup_num_tokens=4
    ),
}


def main() -> None:
    """Answer until there is nothing more to read."""
    sample = ENGINES[sys.argv[1]](json.loads(sys.argv[2]))
    for line in sys.stdin:
        start = time.perf_counter()
        out = sample(int(line))
        seconds = time.perf_counter() - start - out.seconds_of_compilation
        found = {
            "seconds": seconds,
            "tokens": out.tokens,
            "row_steps": out.row_steps,
            "compile_s": out.seconds_of_compilation,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
