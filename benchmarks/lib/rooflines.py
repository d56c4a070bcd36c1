"""Costs of models on accelerators that are not here, as rooflines.

*Published*: models on an A100, by the constants that were fitted to measurements there.
*By the data sheet*: Qwen2.5-7B in bfloat16 with an int8 draft on an H100, without
overheads.

Source of the published ones: EfficientRollout (arXiv 2606.18967), its tables and the
fitted constants of its code.
"""

from __future__ import annotations

import dataclasses

import jax

import er_jax
from er_jax.costs.roofline import Roofline
from er_jax.tools import presets

MODEL, CHIP = "qwen2.5-7b", "h100"
"""What `h100_roofline` is of, by the names in `er_jax.tools.presets`."""


def h100_roofline() -> Roofline:
    """Return the costs of Qwen2.5-7B on one H100, by the data sheet."""
    chip, config = presets.CHIPS[CHIP], presets.PRESETS[MODEL]
    shapes = jax.eval_shape(er_jax.Decoder(config).init, jax.random.key(0))
    matrices = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 1)
    matrices -= config.vocab_size * config.dim  # the embedding table, only looked up
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_size * 2
    attention = 4 * config.num_layers * config.num_heads * config.head_size
    return Roofline(
        target_weights_s=2 * matrices / chip.bytes_per_s,
        draft_weights_s=matrices / chip.bytes_per_s,
        cache_s=entry / chip.bytes_per_s,
        dense_s=2 * matrices / chip.ops_per_s,
        attention_s=attention / chip.ops_per_s,
        target_overhead_s=0.0,
        draft_overhead_s=0.0,
        verify_overhead_s=0.0,
    )


def _roofline(
    *,
    bandwidth: float,
    target_bytes: float,
    draft_bytes: float,
    draft_factor: float,
    cache_bytes: float,
    throughput: float,
    dense: float,
    attention: float,
    overheads_us: tuple[float, float, float],
) -> Roofline:
    """Return a published cost model, in seconds.

    Args:
      bandwidth: bytes per second. target_bytes, draft_bytes: of weights.
      draft_factor: of the seconds that the draft's bytes take by the bandwidth.
      cache_bytes: of one cache entry. throughput: operations per second.
      dense: operations per token. attention: operations per token and cache entry.
      overheads_us: microseconds of a target pass, a draft pass and a verification.
    """
    target_us, draft_us, verify_us = overheads_us
    return Roofline(
        target_weights_s=target_bytes / bandwidth,
        draft_weights_s=draft_factor * draft_bytes / bandwidth,
        cache_s=cache_bytes / bandwidth,
        dense_s=dense / throughput,
        attention_s=attention / throughput,
        target_overhead_s=target_us * 1e-6,
        draft_overhead_s=draft_us * 1e-6,
        verify_overhead_s=verify_us * 1e-6,
    )


@dataclasses.dataclass(frozen=True)
class Published:
    """What is published of one model on eight A100, one engine each.

    costs: the fitted cost model, of forward passes without the vocabulary projection.
    head_s: seconds of the vocabulary projection. keep_prob: acceptance with the switch.
    done: (share of rollouts done, second by which it was reached), in plain decoding.
    always_gamma, always_saved: draft length of drafting in every round, and the share
      of the rollout's seconds that it saved. saved: the share with the switch.
    """

    costs: Roofline
    head_s: float
    keep_prob: float
    done: tuple[tuple[float, float], ...]
    always_gamma: int
    always_saved: float
    saved: float


PUBLISHED = {
    "Qwen2.5-7B": Published(
        costs=_roofline(
            bandwidth=1617462633773.974,
            target_bytes=15230974976,
            draft_bytes=5443042304,
            draft_factor=1.334,
            cache_bytes=26205,
            throughput=233.514e12,
            dense=14140571648,
            attention=401408,
            overheads_us=(39.0, 69.0, 152.3),
        ),
        head_s=0.67e-3,
        keep_prob=0.982,
        done=((0.5, 13.0), (0.9, 22.0), (0.99, 30.0), (1.0, 88.0)),
        always_gamma=7,
        always_saved=0.082,
        saved=0.196,
    ),
    "Llama-3.1-8B": Published(
        costs=_roofline(
            bandwidth=1566304179992.2922,
            target_bytes=16060522496,
            draft_bytes=5591539712,
            draft_factor=1.405,
            cache_bytes=25163,
            throughput=233.514e12,
            dense=15009316864,
            attention=524288,
            overheads_us=(74.0, 86.1, 214.2),
        ),
        head_s=0.67e-3,
        keep_prob=0.958,
        done=((0.5, 10.0), (0.9, 16.0), (0.99, 30.0), (1.0, 123.0)),
        always_gamma=5,
        always_saved=0.059,
        saved=0.107,
    ),
    # Its finishing times are not published. The 7B sampled the same data: its lengths
    # are taken.
    "Qwen2.5-14B": Published(
        costs=_roofline(
            bandwidth=1564389351818.7363,
            target_bytes=29539379200,
            draft_bytes=9721292800,
            draft_factor=1.271,
            cache_bytes=48070,
            throughput=233.514e12,
            dense=27981250560,
            attention=983040,
            overheads_us=(50.0, 153.9, 232.3),
        ),
        head_s=1.0e-3,
        keep_prob=0.976,
        done=(),
        always_gamma=5,
        always_saved=-0.067,
        saved=0.168,
    ),
}
