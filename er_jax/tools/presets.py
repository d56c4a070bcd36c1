"""The models and devices that `er-jax plan` knows by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from er_jax.decoder import DecoderConfig, LinearScaling, RopeScaling
from er_jax.devices import device_memory_bytes


def _qwen2(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=152_064,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_dim=hidden,
        rope_theta=1e6,
        qkv_bias=True,
        max_length=32_768,
        dtype="bfloat16",
    )


def _qwen3(
    dim: int, layers: int, heads: int, hidden: int, *, tied: bool = False
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151_936,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        hidden_dim=hidden,
        head_dim=128,
        rope_theta=1e6,
        qk_norm=True,
        tied_embeddings=tied,
        max_length=40_960,
        dtype="bfloat16",
    )


def _gemma(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int, **others: Any
) -> DecoderConfig:
    # The small models; the text parts of the larger ones see further.
    small = dict(vocab_size=262_144, head_dim=256, window=512, max_length=32_768)
    return DecoderConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_dim=hidden,
        rope_theta=1e6,
        local_rope_theta=1e4,
        global_layers=tuple(range(5, layers, 6)),
        qk_norm=True,
        tied_embeddings=True,
        activation="gelu",
        norm_offset=True,
        post_norms=True,
        scaled_embeddings=True,
        dtype="bfloat16",
        **small | others,
    )


_LARGER_GEMMA: dict[str, Any] = dict(
    vocab_size=262_208,
    window=1024,
    max_length=131_072,
    rope_scaling=LinearScaling(8.0),
)

# Sizes from the config.json files of their publishers.
PRESETS: dict[str, DecoderConfig] = {
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18_944),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13_824),
    "llama-3.1-8b": DecoderConfig(
        vocab_size=128_256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14_336,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        max_length=131_072,
        dtype="bfloat16",
    ),
    "llama-3.1-70b": DecoderConfig(
        vocab_size=128_256,
        dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        hidden_dim=28_672,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        max_length=131_072,
        dtype="bfloat16",
    ),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
    "qwen3-30b-a3b": DecoderConfig(
        vocab_size=151_936,
        dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        hidden_dim=6144,
        head_dim=128,
        rope_theta=1e6,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        expert_dim=768,
        max_length=40_960,
        dtype="bfloat16",
    ),
    "mistral-7b-v0.1": DecoderConfig(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14_336,
        norm_eps=1e-5,
        window=4096,
        max_length=32_768,
        dtype="bfloat16",
    ),
    "gemma-3-270m": _gemma(640, 18, 4, 1, 2048),
    "gemma-3-1b": _gemma(1152, 26, 4, 1, 6912),
    "gemma-3-4b": _gemma(2560, 34, 8, 4, 10_240, **_LARGER_GEMMA),
    "gemma-3-12b": _gemma(3840, 48, 16, 8, 15_360, **_LARGER_GEMMA),
    "gemma-3-27b": _gemma(
        5376, 62, 32, 16, 21_504, head_dim=128, query_scalar=168.0, **_LARGER_GEMMA
    ),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of a device.

    memory_bytes: of its own memory. bytes_per_s: of that memory. ops_per_s: dense, in
    bfloat16.
    """

    memory_bytes: float
    bytes_per_s: float
    ops_per_s: float


# Theoretical peaks, from the product pages of Google Cloud and NVIDIA (SXM boards).
CHIPS: dict[str, Chip] = {
    "v5e": Chip(16 * 2**30, 819e9, 197e12),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12),
    "v6e": Chip(32 * 2**30, 1640e9, 918e12),
    "a100": Chip(80e9, 2039e9, 312e12),
    "h100": Chip(80e9, 3350e9, 989e12),
    "h200": Chip(141e9, 4800e9, 989e12),
}


# Numbers with which XLA compiles for a GPU that is not present; see `_gpu_config`.
GPU_SPECS: dict[str, dict[str, Any]] = {
    "a100": dict(
        major=8, minor=0, cores=108, fpus=64, shared=166_912, l2=41_943_040, ghz=1.41
    ),
    "h100": dict(
        major=9, minor=0, cores=132, fpus=128, shared=232_448, l2=52_428_800, ghz=1.98
    ),
    "h200": dict(
        major=9, minor=0, cores=132, fpus=128, shared=232_448, l2=62_914_560, ghz=1.98
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    name: as the user gave it. kind: its platform. chip: its data sheet, None for the
    CPU of this machine. devices: for XLA to compile for.
    """

    name: str
    kind: str
    chip: Chip | None
    devices: tuple[Any, ...]

    @property
    def memory_bytes(self) -> float:
        """Memory of one device in bytes."""
        if self.chip is not None:
            return self.chip.memory_bytes
        return device_memory_bytes() or math.inf


def target_of(name: str) -> Target:
    """Return a device to compile for, given its name.

    Args:
      name: a TPU slice as type:topology ("v5e:2x4", "v5p:2x2x1", "v6e:2x2"), "a100",
        "h100", "h200", several of them on one host ("h100:8"), or "cpu".
    Raises:
      ValueError: no such device, or its compiler is not installed.
    """
    kind, _, topology = name.partition(":")
    if name == "cpu":
        return Target(name, "cpu", None, (jax.devices("cpu")[0],))
    is_gpu = kind in GPU_SPECS
    is_named = (topology.isdecimal() and int(topology) > 0) or not topology
    if kind not in CHIPS or not (is_named if is_gpu else topology):
        raise ValueError(
            f"device={name!r} is not known; give a TPU slice such as v5e:2x4, "
            f"v5p:2x2x1 or v6e:2x2, one of {', '.join(GPU_SPECS)}, several of these "
            "such as h100:8, or cpu"
        )
    module, extra = (
        ("jax_cuda12_plugin", "cuda-plan") if is_gpu else ("libtpu", "tpu-plan")
    )
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"device={name!r} needs its compiler, which is not installed; "
            f'pip install "er-jax[{extra}]"'
        )
    # There is no driver to query, and no metadata server for this host.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Several plans at once do not conflict, because none uses a device.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        if is_gpu:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=kind,
                topology=f"1x1x{topology or 1}",
                target_config=_gpu_config(kind),
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise ValueError(
            f"device={name!r} is not one that its compiler knows ({error}); give a "
            "slice that exists"
        ) from error
    platform = "cuda" if is_gpu else "tpu"
    return Target(name, platform, CHIPS[kind], tuple(found.devices))


def _gpu_config(kind: str) -> str:
    """Return XLA's description of a GPU (its GpuTargetConfigProto as text)."""
    spec, chip = GPU_SPECS[kind], CHIPS[kind]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": spec["shared"] + 1024,
        "threads_per_core_limit": 2048,
        "core_count": spec["cores"],
        "fpus_per_core": spec["fpus"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(chip.bytes_per_s),
        "l2_cache_size": spec["l2"],
        "clock_rate_ghz": spec["ghz"],
        "device_memory_size": int(chip.memory_bytes),
        "shared_memory_per_block_optin": spec["shared"],
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = f"major: {spec['major']} minor: {spec['minor']}"
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ {capability} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } '
        f"runtime_version {{ major: 12 minor: 8 }} device_description_str: "
        f'"{kind.upper()}"'
    )
