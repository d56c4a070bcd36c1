"""Rules from names to shardings, on eight devices that are eight times this CPU.

Meshes here are abstract: only their shapes matter.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import er_jax
from er_jax import steps
from er_jax.mesh import layout, rules

CONFIG = er_jax.DecoderConfig(
    vocab_size=64, dim=32, num_layers=1, num_heads=8, num_kv_heads=4, hidden_dim=64,
    qkv_bias=True, o_bias=True, qk_norm=True,
)  # fmt: skip


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def specs(tree: Any) -> dict[str, PartitionSpec]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, NamedSharding)
        )
    }


def shapes(**changes: Any) -> tuple[er_jax.Decoder, Any]:
    import dataclasses

    policy = er_jax.Decoder(dataclasses.replace(CONFIG, **changes))
    return policy, jax.eval_shape(policy.init, jax.random.key(0))


def test_every_parameter_has_its_sharding() -> None:
    policy, params = shapes()
    mesh = mesh_of(data=2, fsdp=2, model=2)
    found = specs(rules.param_shardings(params, policy.config, mesh))
    into, out = PartitionSpec("fsdp", "model"), PartitionSpec("model", "fsdp")
    heads, whole = PartitionSpec("model"), PartitionSpec()
    assert found == {
        "embed": out,
        "final_norm": whole,
        "lm_head": into,
        **{f"layers/0/{name}_proj": into for name in ("q", "k", "v", "gate", "up")},
        **{f"layers/0/{name}_proj": out for name in ("o", "down")},
        **{f"layers/0/{name}_bias": heads for name in "qkv"},
        **{
            f"layers/0/{name}": whole
            for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm", "o_bias")
        },
    }


def test_axes_may_be_missing_or_have_other_names() -> None:
    policy, params = shapes()
    found = specs(rules.param_shardings(params, policy.config, mesh_of(data=8)))
    assert {name for spec in found.values() for name in spec} <= {None}
    axes = rules.MeshAxes(model="tensor")
    mesh = mesh_of(tensor=4)
    found = specs(rules.param_shardings(params, policy.config, mesh, axes))
    assert found["layers/0/q_proj"] == PartitionSpec(None, "tensor")


def test_few_key_value_heads_lie_whole() -> None:
    """Four heads over eight devices: they and their cache, and nothing else."""
    policy, params = shapes()
    mesh = mesh_of(model=8)
    found = specs(rules.param_shardings(params, policy.config, mesh))
    assert found["layers/0/k_proj"] == PartitionSpec(None, None)
    assert found["layers/0/k_bias"] == PartitionSpec(None)
    assert found["layers/0/q_proj"] == PartitionSpec(None, "model")
    state = jax.eval_shape(lambda: steps.empty_state(policy, 8, 16))
    shardings = rules.state_shardings(state, policy, mesh)
    assert shardings.cache[0]["keys"].spec == PartitionSpec(None, None, None)


def test_states_are_sharded_by_rows_and_heads() -> None:
    policy, _ = shapes()
    state = jax.eval_shape(lambda: steps.empty_state(policy, 8, 16))
    shardings = rules.state_shardings(state, policy, mesh_of(data=2, model=4))
    assert shardings.tokens.spec == PartitionSpec("data", None)
    assert shardings.live.spec == PartitionSpec("data")
    assert shardings.cache[0]["values"].spec == PartitionSpec("data", None, "model")
    with pytest.raises(ValueError, match="rows=8 are not divided by the mesh's axis"):
        rules.state_shardings(state, policy, mesh_of(data=3))


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_a_draft_lies_as_its_policy(group: int | None, tied: bool) -> None:
    policy, params = shapes(tied_embeddings=tied)
    mesh = mesh_of(fsdp=2, model=4)
    shardings = rules.param_shardings(params, policy.config, mesh)
    config = er_jax.DrafterConfig(group_size=group)
    draft = jax.eval_shape(lambda p: er_jax.attach_draft(p, config).draft, params)
    found = rules.draft_shardings(draft, shardings)
    # The same tree, and every part has as many dimensions as are sharded.
    jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), draft, found)
    q, down = (found["layers"][0][name] for name in ("q_proj", "down_proj"))
    if group is None:
        assert q.codes.spec == PartitionSpec("model", "fsdp")
        assert q.scale.spec == PartitionSpec("model", None)
        assert down.codes.spec == PartitionSpec("fsdp", "model")
    else:
        assert q.codes.spec == PartitionSpec("model", "fsdp", None)
        assert q.scale.spec == PartitionSpec("model", "fsdp", None)
    head = found["embed"].projection if tied else found["lm_head"]
    if group is None:
        assert head.codes.spec == PartitionSpec("model", "fsdp")


def test_what_cannot_be_sharded_is_refused() -> None:
    policy, params = shapes(vocab_size=63)
    mesh = mesh_of(model=4)
    with pytest.raises(ValueError, match=r"does not divide embed, of shape \(63, 32\)"):
        rules.param_shardings(params, policy.config, mesh)
    with pytest.raises(ValueError, match="no rule says how layers/0/other is sharded"):
        rules.param_spec("layers/0/other", (4, 4), policy.config, mesh)


def test_shared_parts_are_parts_of_what_a_device_holds() -> None:
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = layout.rollout_mesh(Mesh(devices, ("data", "fsdp", "model")))
    joint = layout.shared_rows_mesh(mesh)
    assert dict(joint.shape) == {"data": 1, "fsdp": 2, "model": 4}
    sharding = NamedSharding(joint, PartitionSpec("fsdp", "model"))
    parted = layout.as_sharded(sharding, mesh)
    assert parted.spec == PartitionSpec("fsdp", ("model", "data"))
    before = NamedSharding(mesh, PartitionSpec("fsdp", "model"))
    shape = (8, 16)
    parts = sharding.devices_indices_map(shape)
    assert parts == parted.devices_indices_map(shape), "not the same parts"
    for device, (rows, columns) in parts.items():
        old_rows, old_columns = before.devices_indices_map(shape)[device]
        assert rows == old_rows
        assert set(range(16)[columns]) < set(range(16)[old_columns])


def test_what_is_not_divided_is_not_shared() -> None:
    devices = np.array(jax.devices()).reshape(8, 1)
    mesh = layout.shared_rows_mesh(
        layout.rollout_mesh(Mesh(devices, ("data", "model")))
    )

    def found(drafter: er_jax.DrafterConfig | None = None, **changes: Any) -> Any:
        policy, params = shapes(**changes)
        policy_and_draft = er_jax.PolicyParams(policy=params, draft=None)
        if drafter is not None:
            policy_and_draft = jax.eval_shape(
                lambda p: er_jax.attach_draft(p, drafter), params
            )
        return layout.shared_rows_shardings(policy, policy_and_draft, mesh)

    assert found() is not None
    assert found(er_jax.DrafterConfig()) is not None
    assert found(hidden_dim=68) is None
    # Eight parts of 64 inputs, and groups of 16 of them.
    assert found(er_jax.DrafterConfig(bits=4, group_size=16)) is None
    other: Any = object()
    assert layout.shared_rows_shardings(other, found(), mesh) is None
