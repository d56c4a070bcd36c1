"""Parameters of Tunix's models as those of the built-in decoder.

`tunix_families` says which array of theirs becomes which leaf of ours. Sizes are read
off the arrays. LoRA parameters are merged into the weight that they belong to.

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
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax.decoder import Decoder, DecoderConfig
from er_jax.drafter import (
    DrafterConfig,
    PolicyParams,
    TiedEmbedding,
    attach_draft,
    is_weight,
)
from er_jax.integrations.tunix_families import EMBED, FAMILIES, PROJECTION, Leaf
from er_jax.mesh.layout import on_mesh
from er_jax.mesh.rules import AXES, DATA_AXIS, MeshAxes, draft_shardings
from er_jax.types import Params

LORA = re.compile(r"(.*)_lora_([ab])")


DTYPES = ("float32", "bfloat16", "float64")


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
          config: of the model: what `Family.fields` reads, and, where it computes in
            another type than that of its parameters, `dtype`.
          arrays: its parameters by path, or their shapes and dtypes.
          dtype: of parameters, activations and cache; None is what the model computes
            in.
          lora_scale: what the product of LoRA parameters is multiplied with.
        Raises:
          ValueError: an array that is missing or unknown, LoRA parameters without a
            scale, a type that is not supported.
        """
        layers = {int(n) for n in re.findall(r"\blayers/(\d+)/", " ".join(arrays))}
        kind = FAMILIES[family]
        leaves: dict[tuple[str | int, ...], Leaf] = {(x.ours,): x for x in kind.top}
        is_tied = PROJECTION.theirs not in arrays
        if not is_tied:
            leaves[(PROJECTION.ours,)] = PROJECTION
        for i, x in itertools.product(sorted(layers), kind.layer(arrays)):
            theirs = f"layers/{i}/{x.theirs}"
            leaves["layers", i, x.ours] = dataclasses.replace(x, theirs=theirs)
        _check_names(family, {x.theirs for x in leaves.values()}, arrays, lora_scale)
        first = {path[2]: x for path, x in leaves.items() if path[:2] == ("layers", 0)}

        def shape(leaf: Leaf) -> tuple[int, ...]:
            return leaf.shape(arrays[leaf.theirs].shape)

        vocab_size, dim = shape(EMBED)
        # All families keep the heads of this one apart, [H, D, d].
        num_heads, head_dim, _ = arrays[first["o_proj"].theirs].shape
        found = dtype or getattr(config, "dtype", None) or arrays[EMBED.theirs].dtype
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
                num_kv_heads=shape(first["k_proj"])[1] // head_dim,
                head_dim=head_dim,
                hidden_dim=shape(first["gate_proj"])[1],
                qkv_bias="q_bias" in first,
                qk_norm="q_norm" in first,
                tied_embeddings=is_tied,
                dtype=name,
                **kind.fields(config, len(layers)),
            )
        )
        return cls(leaves, frozenset(arrays), policy, lora_scale)

    def convert(self, arrays: Mapping[str, jax.Array]) -> Params:
        """Return the decoder's parameters; pure, traced by `engine.adoption`."""
        dtype = self.policy.parameter_dtype()

        def leaf(of: Leaf) -> jax.Array:
            return of.made_from(self._merged_lora(arrays, of)).astype(dtype)

        return self._assembled({path: leaf(of) for path, of in self.leaves.items()})

    def _merged_lora(self, arrays: Mapping[str, jax.Array], of: Leaf) -> jax.Array:
        """Return an array; if it has LoRA parameters, plus scale * A B, in float32."""
        name = of.theirs
        x = arrays[name]
        if not self._has_lora(name):
            return x
        a, b = (arrays[f"{name}_lora_{part}"].astype(jnp.float32) for part in "ab")
        change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        order = of.inputs_first(x.ndim)
        change = change.reshape([x.shape[axis] for axis in order])
        scale = jnp.asarray(self.lora_scale, jnp.float32)
        return x.astype(jnp.float32) + scale * change.transpose(*np.argsort(order))

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
        drafters: Sequence[DrafterConfig],
    ) -> PolicyParams:
        """Return the shardings of parameters and drafts: those of the arrays.

        An axis of ours that merges several of theirs is sharded over all of their mesh
        axes. Nothing is sharded over the axis of rows.

        Args:
          arrays: by path; with a `NamedSharding` each, on a mesh of the same devices.
          mesh: from `mesh.layout.rollout_mesh`. axes: names of its axes in the arrays'.
          drafters: how to quantize each draft.
        """

        def sharding(of: Leaf) -> NamedSharding:
            x = arrays[of.theirs]
            groups = of.groups(len(x.shape))
            names = _axis_names(x.sharding, len(x.shape), mesh, axes)
            entries: list[tuple[str, ...] | None] = []
            for group, size in zip(groups, of.shape(x.shape), strict=True):
                several = tuple(itertools.chain(*(names[i] for i in group)))
                parts = math.prod(mesh.shape[name] for name in several)
                is_whole = of.is_whole or not several or size % parts != 0
                entries.append(None if is_whole else several)
            return NamedSharding(mesh, PartitionSpec(*entries))

        policy = self._assembled({p: sharding(of) for p, of in self.leaves.items()})
        shapes = jax.eval_shape(self.convert, _shapes(arrays))
        quantized = [drafter.quantization for drafter in drafters]
        found = jax.eval_shape(lambda p: attach_draft(p, quantized), shapes)
        draft, *others = (draft_shardings(draft, policy) for draft in found.drafts)
        return PolicyParams(policy=policy, draft=draft, others=tuple(others))


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
