"""The engine of a mesh: the same programs, with rows in data shards.

A *data shard* is the rows of the devices that share one copy of the weights. Every data
shard runs the same program on its rows (`MeshLayout.over_rows`); data shards
communicate only in exit tests, in the info for the host, and in moves of rows. Within a
data shard, the compiler partitions the program by the shardings of the parameters.

For few rows, all devices can share the rows: `MeshEngine.for_shared_rows` has those
programs. Where the mesh spans processes, all of them must call the same methods in the
same order, so threads must not share an engine there.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax import steps
from er_jax.acceptance import AcceptRule
from er_jax.drafter import DrafterConfig, PolicyParams
from er_jax.engine import first_use
from er_jax.engine.engine import Engine
from er_jax.engine.kept import KeptEngines, kept_engines
from er_jax.engine.programs import abstract
from er_jax.engine.protocol import ROWS, SAME, TokenBuffers
from er_jax.engine.windows import derive_draft
from er_jax.kernels import choice
from er_jax.mesh import moves
from er_jax.mesh.layout import (
    MeshLayout,
    as_sharded,
    on_mesh,
    relabelled,
    shared_rows_mesh,
    shared_rows_shardings,
)
from er_jax.mesh.processes import Processes, fetch_rows
from er_jax.mesh.rules import DATA_AXIS, draft_shardings, state_shardings
from er_jax.settings import marked
from er_jax.types import Admission, DecodeState, Params, Policy, Sampling

REPLICATED, OVER_ROWS = PartitionSpec(), PartitionSpec(DATA_AXIS)


@functools.partial(jax.jit, static_argnames=("policy", "cache_length", "layout"))
def run_take_over(
    policy: Policy,
    state: DecodeState,
    rows: jax.Array,
    moved: moves.Moves,
    *,
    cache_length: int,
    layout: MeshLayout,
) -> DecodeState:
    """Move rows within and between data shards; see `steps.take`, `moves.exchange`."""

    def move(state: DecodeState, rows: jax.Array, moved: moves.Moves) -> DecodeState:
        taken = steps.take(state, rows, cache_length)
        if layout.num_shards == 1:
            return taken
        return moves.exchange(state, taken, moved, DATA_AXIS)

    run = layout.over_rows(move, (ROWS, ROWS, SAME), ROWS)
    return layout.lay_out(run(state, rows, moved), policy)


def _same(tree: Any) -> Any:
    """Return arrays unchanged: the function of programs that only reshard."""
    return tree


class MeshEngine(Engine):
    """The compiled programs of one policy and one acceptance rule, on a mesh.

    Parameters and drafts must be on the mesh (`layout.put_on_mesh`); host arrays must
    be the same in all processes.

    Args:
      policy: the model. accept: the acceptance rule. mesh: from `layout.rollout_mesh`.
      attention: which implementation its programs use, a `choice.AttentionChoice`.
      owner: None, or the engine that this one is the `for_shared_rows` of; it keeps the
        executables of both.
    """

    def __init__(
        self,
        policy: Policy,
        accept: AcceptRule,
        mesh: Mesh,
        attention: str = "auto",
        *,
        owner: MeshEngine | None = None,
    ) -> None:
        agreement = Processes(mesh)
        name = (
            _implementation(attention, mesh, agreement)
            if owner is None
            else owner.layout.attention
        )
        super().__init__(policy, accept, layout=MeshLayout(mesh, name))
        self.mesh = mesh
        self.agreement = agreement
        self._for_shared_rows: MeshEngine | None = None
        if owner is not None:
            self._executables, self._prefix = owner._executables, "shared rows: "

    @property
    def for_shared_rows(self) -> MeshEngine:
        """The engine of the same devices for shared rows."""
        with self._executables.lock:
            if self._for_shared_rows is None:
                mesh = shared_rows_mesh(self.mesh)
                self._for_shared_rows = MeshEngine(
                    self.policy, self.accept, mesh, owner=self
                )
        return self._for_shared_rows

    def signature(self, tree: Any) -> Hashable:
        """Return a hashable description of arrays, shardings included."""
        return mesh_signature(tree, self.mesh)

    @property
    def _device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _abstract_same(self, tree: Any) -> Any:
        replicated = self._sharding(REPLICATED)
        return abstract(tree, jax.tree.map(lambda _: replicated, tree))

    def _abstract_settings(self, settings: Sampling) -> Any:
        over_rows, replicated = map(self._sharding, (OVER_ROWS, REPLICATED))
        return abstract(settings, marked(settings, over_rows, replicated))

    def _abstract_params(self, params: Any) -> Any:
        shardings = jax.tree.map(lambda x: on_mesh(x.sharding, self.mesh), params)
        return abstract(params, shardings)

    def _abstract_state(self, state: DecodeState) -> Any:
        return abstract(state, state_shardings(state, self.policy, self.mesh))

    def _abstract_admission(self, admission: Admission) -> Any:
        over_rows, replicated = map(self._sharding, (OVER_ROWS, REPLICATED))
        shardings = jax.tree.map(
            lambda x: over_rows if x.ndim else replicated, admission
        )
        return abstract(admission, shardings)

    def take(self, state: DecodeState, rows: np.ndarray, length: int) -> DecodeState:
        """Move rows (`NONE` for an empty one) to a state of `length` positions."""
        rows = np.asarray(rows, np.int32)
        local, moved = moves.plan_moves(rows, state.rows, self.layout.num_shards)
        program = self._program(
            ("take", state.rows, state.cache_length, len(rows), length),
            run_take_over,
            lambda f: f.lower(
                self.policy,
                self._abstract_state(state),
                abstract(local, self._sharding(OVER_ROWS)),
                self._abstract_same(moved),
                cache_length=length,
                layout=self.layout,
            ),
        )
        return program.call(state, local, moved)

    def fetch_rows(
        self, buffers: TokenBuffers, rows: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return tokens and log-probabilities, `[S]` each, of some rows; see `Engine`.

        Several processes get different rows; see `processes.fetch_rows`.
        """
        if buffers[0].is_fully_addressable:
            return super().fetch_rows(buffers, rows)
        return fetch_rows(buffers, rows)

    def _attach_function(self, params: Params, config: DrafterConfig) -> Any:
        # Sharded like the weights; the compiler might choose another sharding.
        shaped = self._abstract_params(params)
        shardings = jax.tree.map(lambda x: x.sharding, shaped)
        draft = jax.eval_shape(functools.partial(derive_draft, config=config), shaped)
        return jax.jit(
            derive_draft,
            static_argnames=("config",),
            out_shardings=draft_shardings(draft, shardings),
        )

    def shared_rows_params(self, params: PolicyParams) -> Any:
        """Return the shapes of parameters with shardings for `for_shared_rows`.

        None if they have no such sharding; see `layout.shared_rows_shardings`.
        """
        mesh = self.for_shared_rows.mesh
        shardings = shared_rows_shardings(self.policy, params, mesh)
        return None if shardings is None else abstract(params, shardings)

    def params_to_shared_rows(self, params: PolicyParams) -> PolicyParams:
        """Return parameters for `for_shared_rows`; no weights are sent."""
        shapes = self.shared_rows_params(params)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        kind = None if params.draft is None else self.draft_kind(params.drafts)
        name = ("params to shared rows", kind)
        return self._resharded(name, params, self._abstract_params(params), shardings)

    def has_move(self, is_to_shared: bool, rows: int, length: int) -> bool:
        """Whether the move of such a state to or from shared rows is compiled."""
        return (self.move_name(is_to_shared), rows, length) in self.compiled

    @staticmethod
    def move_name(is_to_shared: bool) -> str:
        """Return the kind of such a move, as it begins the names of programs."""
        return "to shared rows" if is_to_shared else "to data shards"

    def to_shared_rows(self, state: DecodeState) -> DecodeState:
        """Return a state for `for_shared_rows`: all rows, some heads on each device."""
        mesh = self.for_shared_rows.mesh
        shardings = state_shardings(state, self.policy, mesh)
        name = (self.move_name(True), state.rows, state.cache_length)
        return self._resharded(name, state, self._abstract_state(state), shardings)

    def to_data_shards(self, state: DecodeState) -> DecodeState:
        """Return a state of `for_shared_rows` as a state of this engine."""
        here, shared = (
            state_shardings(state, self.policy, mesh)
            for mesh in (self.mesh, self.for_shared_rows.mesh)
        )
        there = self._as_sharded(shared)
        state = jax.tree.map(relabelled, state, there)
        program = self._program(
            (self.move_name(False), state.rows, state.cache_length),
            jax.jit(_same, out_shardings=here),
            lambda f: f.lower(abstract(state, there)),
        )
        return program.call(state)

    def _resharded(
        self, name: tuple[Any, ...], tree: Any, shapes: Any, shardings: Any
    ) -> Any:
        """Return arrays for `for_shared_rows`, resharded by one program."""
        program = self._program(
            name,
            jax.jit(_same, out_shardings=self._as_sharded(shardings)),
            lambda f: f.lower(shapes),
        )
        return jax.tree.map(relabelled, program.call(tree), shardings)

    def _as_sharded(self, shardings: Any) -> Any:
        """Return shardings of `for_shared_rows` with the axes of this engine's mesh."""
        return jax.tree.map(lambda s: as_sharded(s, self.mesh), shardings)


def _implementation(attention: str, mesh: Mesh, agreement: Processes) -> str:
    """Return the implementation of attention for a mesh, the same in all processes."""
    here = (d for d in mesh.devices.flat if d.process_index == jax.process_index())
    device = next(here)
    if choice.on_platform(attention, choice.platform_of(device)) == choice.XLA:
        return choice.XLA
    name, failure = choice.XLA, None
    try:
        name = first_use.implementation(attention, device)
    except ValueError as error:
        failure = error
    _, raised = agreement.sync_or_raise([0.0], failure)
    if raised is not None:
        raise raised
    # A kernel that one process refuses, none may use: they run the same programs.
    (refusals,) = agreement.sum(np.array([name == choice.XLA], np.int32))
    return choice.XLA if refusals else name


def mesh_signature(tree: Any, mesh: Mesh) -> Hashable:
    """Return a hashable description of arrays, shardings included."""
    leaves, structure = jax.tree.flatten(tree)
    described = [(x.shape, x.dtype, on_mesh(x.sharding, mesh)) for x in leaves]
    return structure, tuple(described)


def mesh_engines_for(
    policy: Policy,
    accept: AcceptRule,
    params_and_meshes: Sequence[tuple[Params, Mesh]],
    attention: str = "auto",
    kept: KeptEngines | None = None,
) -> list[MeshEngine]:
    """Return the engines of one call; they are kept and dropped together.

    Args:
      policy, accept, attention, kept: as for `engine.kept.engine_for`.
      params_and_meshes: policy parameters and mesh of each engine.
    """
    return kept_engines(
        {
            (
                policy,
                mesh_signature(params, mesh),
                accept,
                attention,
                mesh,
            ): functools.partial(MeshEngine, policy, accept, mesh, attention)
            for params, mesh in params_and_meshes
        },
        kept,
    )
