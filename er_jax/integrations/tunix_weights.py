"""Parameters of Tunix's models as those of the built-in decoder.

A family of models is a list of `Leaf`s: which array of theirs becomes which leaf of
ours. Sizes are read off the arrays. Their attention weights keep the heads apart,
`[d, H, D]`; ours are matrices, `[d, H * D]`. LoRA parameters are merged into the weight
that they belong to.

This module knows arrays by their paths, joined by slashes, and imports neither Tunix
nor Flax NNX.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    TiedEmbedding,
    attach_draft,
    is_weight,
)
from er_jax.mesh.layout import on_mesh
from er_jax.mesh.rules import AXES, DATA_AXIS, MeshAxes, draft_shardings
from er_jax.types import Params

LORA = re.compile(r"(.*)_lora_([ab])")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of ours and the array of theirs that it is made from.

    ours: its name. theirs: the path of the array, within a layer for leaves of layers.
    merged: for each axis of ours the axes of theirs that it merges; None is as it is.
    is_whole: whether every device holds all of it. The norms of a step would otherwise
      be gathered one by one; they are small.
    """

    ours: str
    theirs: str
    merged: tuple[tuple[int, ...], ...] | None = None
    is_whole: bool = False


HEADS_OUT = ((0,), (1, 2))  # [d, H, D] -> [d, H * D]
HEADS_IN = ((0, 1), (2,))  # [H, D, d] -> [H * D, d]

LAYER = (
    Leaf("attn_norm", "input_layernorm/w", is_whole=True),
    Leaf("q_proj", "attn/q_proj/w", HEADS_OUT),
    Leaf("k_proj", "attn/k_proj/w", HEADS_OUT),
    Leaf("v_proj", "attn/v_proj/w", HEADS_OUT),
    Leaf("o_proj", "attn/o_proj/w", HEADS_IN),
    Leaf("mlp_norm", "post_attention_layernorm/w", is_whole=True),
    Leaf("gate_proj", "mlp/gate_proj/kernel"),
    Leaf("up_proj", "mlp/up_proj/kernel"),
    Leaf("down_proj", "mlp/down_proj/kernel"),
)
BIASES = tuple(Leaf(f"{x}_bias", f"attn/{x}_bias") for x in "qkv")
HEAD_NORMS = tuple(Leaf(f"{x}_norm", f"attn/{x}_norm/w", is_whole=True) for x in "qk")
TOP = (
    Leaf("embed", "embedder/input_embedding"),
    Leaf("final_norm", "final_norm/w", is_whole=True),
)
PROJECTION = Leaf("lm_head", "lm_head/w")

# The leaves of a layer, by the name of Tunix's class. A family that the decoder learns
# to run is added here.
FAMILIES: dict[str, tuple[Leaf, ...]] = {
    "Llama3": LAYER,
    "Qwen2": (*LAYER, *BIASES),
    "Qwen3": (*LAYER, *HEAD_NORMS),
}

DTYPES = ("float32", "bfloat16", "float64")


def family_of(names: Sequence[str]) -> str:
    """Return the family of a model.

    Args:
      names: of its class and of the classes that it derives from.
    Raises:
      ValueError: it is of no family that can be sampled.
    """
    found = next((name for name in names if name in FAMILIES), None)
    if found is None:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"rollout_actor is a {names[0]}; of Tunix's models, er_jax samples {known} "
            "and those derived from them. Use rollout_engine='vanilla' for others, "
            "Gemma among them"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the arrays of one model become a decoder's parameters; `of` makes it.

    leaves: ours by path, with their paths in full. names: of all arrays of the model.
    dtype: of the parameters. lora_scale: alpha / rank; None without LoRA.
    """

    leaves: dict[tuple[str | int, ...], Leaf]
    names: frozenset[str]
    policy: Decoder
    lora_scale: float | None

    @classmethod
    def of(
        cls,
        family: str,
        config: Any,
        arrays: Mapping[str, Any],
        *,
        dtype: Any = None,
        lora_scale: float | None = None,
    ) -> Weights:
        """Read the sizes of a model off its arrays.

        Args:
          family: a name of `FAMILIES`.
          config: of the model, with `norm_eps` and `rope_theta`, and, where it computes
            in another type than that of its parameters, `dtype`.
          arrays: its parameters by path, or their shapes and dtypes.
          dtype: of parameters, activations and cache; None is what the model computes
            in.
          lora_scale: what the product of LoRA parameters is multiplied with.
        Raises:
          ValueError: an array that is missing or unknown, LoRA parameters without a
            scale, a type that is not supported.
        """
        layers = {int(n) for n in re.findall(r"\blayers/(\d+)/", " ".join(arrays))}
        leaves: dict[tuple[str | int, ...], Leaf] = {(x.ours,): x for x in TOP}
        is_tied = PROJECTION.theirs not in arrays
        if not is_tied:
            leaves[(PROJECTION.ours,)] = PROJECTION
        for i, x in itertools.product(sorted(layers), FAMILIES[family]):
            theirs = f"layers/{i}/{x.theirs}"
            leaves["layers", i, x.ours] = dataclasses.replace(x, theirs=theirs)
        _check_names(family, {x.theirs for x in leaves.values()}, arrays, lora_scale)

        def shape(name: str) -> tuple[int, ...]:
            return tuple(arrays[name].shape)

        vocab_size, dim = shape(TOP[0].theirs)
        _, num_heads, head_dim = shape("layers/0/attn/q_proj/w")
        found = dtype or getattr(config, "dtype", None) or arrays[TOP[0].theirs].dtype
        name = jnp.dtype(found).name
        if name not in DTYPES:
            raise ValueError(
                f"data_type={name} is not supported; use one of {', '.join(DTYPES)}"
            )
        policy = Decoder(
            DecoderConfig(
                vocab_size=vocab_size,
                dim=dim,
                num_layers=len(layers),
                num_heads=num_heads,
                num_kv_heads=shape("layers/0/attn/k_proj/w")[1],
                head_dim=head_dim,
                hidden_dim=shape("layers/0/mlp/gate_proj/kernel")[1],
                rope_theta=float(config.rope_theta),
                norm_eps=float(config.norm_eps),
                qkv_bias="layers/0/attn/q_bias" in arrays,
                qk_norm="layers/0/attn/q_norm/w" in arrays,
                tied_embeddings=is_tied,
                dtype=name,
            )
        )
        return cls(leaves, frozenset(arrays), policy, lora_scale)

    def convert(self, arrays: Mapping[str, jax.Array]) -> Params:
        """Return the decoder's parameters; pure, traced by `engine.adoption`."""
        dtype = self.policy.parameter_dtype()

        def leaf(of: Leaf) -> jax.Array:
            x = self._merged_lora(arrays, of.theirs)
            if of.merged is not None:
                x = x.reshape(
                    [math.prod(x.shape[i] for i in axes) for axes in of.merged]
                )
            return x.astype(dtype)

        return self._assembled({path: leaf(of) for path, of in self.leaves.items()})

    def _merged_lora(self, arrays: Mapping[str, jax.Array], name: str) -> jax.Array:
        """Return an array; if it has LoRA parameters, plus scale * A B, in float32."""
        x = arrays[name]
        if not self._has_lora(name):
            return x
        a, b = (arrays[f"{name}_lora_{part}"].astype(jnp.float32) for part in "ab")
        change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        scale = jnp.asarray(self.lora_scale, jnp.float32)
        return x.astype(jnp.float32) + scale * change.reshape(x.shape)

    def _has_lora(self, name: str) -> bool:
        return f"{name}_lora_a" in self.names

    def _assembled(self, leaves: Mapping[tuple[str | int, ...], Any]) -> Params:
        """Return leaves by path as the decoder's parameters."""
        count = self.policy.config.num_layers
        params: dict[str, Any] = {"layers": [{} for _ in range(count)]}
        for path, leaf in leaves.items():
            node: Any = params
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = leaf
        if self.policy.config.tied_embeddings:
            params["embed"] = TiedEmbedding(table=params["embed"])
        return params

    def kept(
        self, arrays: Mapping[str, Any], shardings: Params | None = None
    ) -> Params:
        """Return the names of the arrays that are leaves as they are, "" for others.

        Args:
          arrays: by path, or their shapes, dtypes and shardings.
          shardings: of our parameters; None on one device.
        """
        dtype = self.policy.parameter_dtype()
        wanted = self._flat(shardings)

        def name(path: tuple[str | int, ...], of: Leaf) -> str:
            x = arrays[of.theirs]
            same = of.merged is None and x.dtype == dtype
            if shardings is not None:
                here = on_mesh(x.sharding, wanted[path].mesh)
                same = same and here is not None
                same = same and here.is_equivalent_to(wanted[path], len(x.shape))  # type: ignore[union-attr]
            return of.theirs if same and not self._has_lora(of.theirs) else ""

        return self._assembled({p: name(p, of) for p, of in self.leaves.items()})

    def _flat(self, params: Params | None) -> dict[tuple[str | int, ...], Any]:
        """Return the leaves of parameters by path; the reverse of `_assembled`."""
        found = {}
        for path in self.leaves if params is not None else ():
            node: Any = params
            for part in path:
                node = node[part]
            found[path] = node.table if is_weight(node) else node
        return found

    def shardings(
        self,
        arrays: Mapping[str, Any],
        mesh: Mesh,
        axes: MeshAxes,
        drafter: DrafterConfig,
    ) -> PolicyParams:
        """Return the shardings of parameters and draft: those of the arrays.

        An axis of ours that merges several of theirs is sharded over all of their mesh
        axes. Nothing is sharded over the axis of rows.

        Args:
          arrays: by path; with a `NamedSharding` each, on a mesh of the same devices.
          mesh: from `mesh.layout.rollout_mesh`. axes: names of its axes in the arrays'.
          drafter: how to quantize.
        """

        def sharding(of: Leaf) -> NamedSharding:
            x = arrays[of.theirs]
            groups = of.merged or tuple((i,) for i in range(len(x.shape)))
            sizes = [math.prod(x.shape[i] for i in group) for group in groups]
            names = _axis_names(x.sharding, len(x.shape), mesh, axes)
            entries: list[tuple[str, ...] | None] = []
            for group, size in zip(groups, sizes, strict=True):
                several = tuple(itertools.chain(*(names[i] for i in group)))
                parts = math.prod(mesh.shape[name] for name in several)
                is_whole = of.is_whole or not several or size % parts != 0
                entries.append(None if is_whole else several)
            return NamedSharding(mesh, PartitionSpec(*entries))

        policy = self._assembled({p: sharding(of) for p, of in self.leaves.items()})
        shapes = jax.eval_shape(self.convert, _shapes(arrays))
        draft = jax.eval_shape(lambda p: attach_draft(p, drafter.quantization), shapes)
        return PolicyParams(policy=policy, draft=draft_shardings(draft.draft, policy))


def placed(
    arrays: Mapping[str, jax.Array], mesh: Mesh | None, device: jax.Device
) -> dict[str, jax.Array]:
    """Return arrays on the devices of a rollout; those that are there stay as they are.

    Args:
      arrays: by path. mesh: of the rollout, with the trainer's names of axes; None is
        `device` alone.
    """

    def place(x: jax.Array) -> jax.Array:
        if mesh is None:
            return x if x.devices() == {device} else jax.device_put(x, device)
        old = x.sharding
        is_named = isinstance(old, NamedSharding)
        if is_named and list(old.mesh.devices.flat) == list(mesh.devices.flat):  # type: ignore[attr-defined]
            return x
        spec = old.spec if is_named else PartitionSpec()  # type: ignore[attr-defined]
        entries: list[Any] = []
        for entry, size in zip(spec, x.shape, strict=False):
            several = entry if isinstance(entry, tuple) else (entry,)
            known = tuple(name for name in several if name in mesh.shape)
            fits = size % math.prod(mesh.shape[name] for name in known) == 0
            entries.append(known if known and fits else None)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*entries)))

    return {name: place(x) for name, x in arrays.items()}


def _shapes(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}


def _axis_names(
    sharding: Any, rank: int, mesh: Mesh, axes: MeshAxes
) -> list[tuple[str, ...]]:
    """Return the axes of `mesh` that each axis of an array is sharded over."""
    ours = dict(zip(dataclasses.astuple(axes), AXES, strict=True))
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    found = []
    for entry in (*spec, *[None] * (rank - len(spec))):
        several = entry if isinstance(entry, tuple) else (entry,)
        known = [ours[name] for name in several if name in ours]
        used = [name for name in known if name != DATA_AXIS and mesh.shape[name] > 1]
        found.append(tuple(used))
    return found


def _check_names(
    family: str,
    wanted: set[str],
    arrays: Mapping[str, Any],
    lora_scale: float | None,
) -> None:
    """Refuse arrays that are missing, or that no leaf is made from."""
    missing = sorted(wanted - set(arrays))
    if missing:
        raise ValueError(
            f"rollout_actor is a {family} and lacks {missing[0]}; it is none of "
            "Tunix's own, or is quantized: use rollout_engine='vanilla'"
        )
    lora = {name: LORA.fullmatch(name) for name in sorted(set(arrays) - wanted)}
    for name, found in lora.items():
        if found is None or found[1] not in wanted:
            raise ValueError(
                f"rollout_actor is a {family} and holds {name}, for which er_jax's "
                "decoder has no place; use rollout_engine='vanilla'"
            )
        if lora_scale is None:
            raise ValueError(
                f"rollout_actor holds LoRA parameters, {name} first; to merge them, "
                "give their scale: functools.partial(ErJaxRollout, lora_scale=alpha / "
                "rank)"
            )
