"""The call of a rollout, checked: request, parameters, engine and controller.

All that can be refused is refused here, on the host, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from er_jax import checks, kv_cache
from er_jax.config import RolloutConfig, parse_control
from er_jax.control.controller import Controller
from er_jax.costs import store
from er_jax.devices import device_bytes
from er_jax.drafter import PolicyParams, check_draft, check_number
from er_jax.engine.engine import Engine
from er_jax.engine.kept import engine_for
from er_jax.journal import Journal, array_digest
from er_jax.mesh import layout
from er_jax.mesh.engine import MeshEngine, mesh_engines_for
from er_jax.mesh.processes import Processes
from er_jax.mesh.topology import DataShards
from er_jax.request import Request, TurnSizes, request_of
from er_jax.respond import Respond
from er_jax.result import Completion, Rollout
from er_jax.resume import completions_of, earlier_rollout, turn_end, turn_of
from er_jax.scheduler.prompts import Reuse
from er_jax.scheduler.topology import OneDevice, Topology
from er_jax.session import Session, check_session
from er_jax.stats import RolloutStats
from er_jax.types import Params, Policy, View

# The settings that decide which tokens are sampled.
DECIDING = (
    "n", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop_token_ids",
    "accept", "logprobs", "min_new_tokens", "stop_sequences", "banned_ids",
    "logit_bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """The checked arguments of a rollout, with its request, engine and controller.

    params: as given, on the devices of `engine`.
    resume: the earlier rollout, or None. ended, begun: its completions by sequence, of
      those that are returned as they are and those that go on. turned: why the last
      turns have ended of those that were not answered.
    journal: the file that the call goes on with, or None; what it holds is a part of
      `resume`.
    """

    params: Params | PolicyParams
    prompts: list[np.ndarray]
    sequence_ids: np.ndarray
    request: Request
    engine: Engine
    controller: Controller
    resume: Rollout | None = None
    ended: Mapping[int, Completion] = dataclasses.field(default_factory=dict)
    begun: Mapping[int, Completion] = dataclasses.field(default_factory=dict)
    journal: Journal | None = None
    turned: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def policy_params(self) -> Params:
        """The parameters without a draft."""
        params = self.params
        return params.policy if isinstance(params, PolicyParams) else params

    @property
    def told_at_once(self) -> dict[int, Completion]:
        """Completions, by sequence, that have ended and that nobody was told of.

        Those that a journal holds, because whoever was told of them before is gone; and
        those that went on, and end without another token: at the limit of this call, or
        at a turn that nobody answers now.
        """
        found = {} if self.journal is None else dict(self.journal.finished)
        if self.resume is not None:
            before = self.resume.finish_reason
            found |= {
                s: c for s, c in self.ended.items() if c.finish_reason != before[s]
            }
        return found


def journal_of(
    path: str | os.PathLike[str], version: int, mesh: Mesh | None
) -> Journal:
    """Return the journal of a call; of several processes each has a file of its own.

    Args:
      path: of the call. version: of its tokens. mesh: of the call.
    """
    if not isinstance(mesh, Mesh):
        return Journal(path, version)  # None, or refused as a mesh.
    processes = Processes(mesh)
    if processes.is_spread:
        path = f"{os.fspath(path)}.{processes.rank}-of-{processes.count}"
    return Journal(path, version, processes)


def prepare(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    sequence_ids: Sequence[int] | None,
    controller: Controller | None,
    mesh: Mesh | None,
    resume: Rollout | str | os.PathLike[str] | None = None,
    journal: Journal | None = None,
    key: np.ndarray | None = None,
    respond: Respond | None = None,
    session: Session | None = None,
) -> Call:
    """Check the arguments of a rollout; find its engine and controller.

    Parameters that are not on the mesh are moved there. `journal` has been entered, and
    goes with the words of `key`. Engines and controllers are those of the session, if
    there is one.
    """
    if session is not None:
        check_session(session)
    checks.check_policy(policy)
    is_drafting = max(parse_control(config.control, config.gammas)) > 0
    if isinstance(params, PolicyParams) and params.draft is None and not is_drafting:
        params = params.policy
    arrays = checks.checked_prompts(prompts, policy.vocab_size)
    checks.check_num_prompts(config, len(arrays))
    checks.check_result_fits(len(arrays), config)
    ids = checks.checked_sequence_ids(sequence_ids, len(arrays) * config.n)
    checks.check_token_ids(config, policy.vocab_size)
    checks.check_length(arrays, config, getattr(policy, "max_length", None))
    earlier = None
    ended: dict[int, Completion] = {}
    begun: dict[int, Completion] = {}
    if resume is not None:
        earlier = earlier_rollout(resume, arrays, ids, config, policy.vocab_size)
    if journal is not None:
        named = _named(policy, params, arrays, ids, config, key, earlier, respond)
        journal.begin(named)
        earlier = journal.gone_on(arrays, ids, config, earlier)
    if earlier is not None:
        over = () if journal is None else journal.finished.keys()
        ended, begun = completions_of(earlier, config, over)
    limit = None if respond is None else respond.max_turn_tokens
    checks.check_turns(limit, config)
    turned: dict[int, str] = {}
    for row, completion in begun.items():
        reason = turn_end(completion, config, row, limit)
        if reason is not None:
            turned[row] = reason
    if respond is None:
        # Nobody answers: they end as what was asked for now would have.
        for row, reason in turned.items():
            ended[row] = dataclasses.replace(begun.pop(row), finish_reason=reason)
        turned = {}
    turns = None
    if respond is not None or any(not found.mask.all() for found in begun.values()):
        starts = {row: turn_of(found) for row, found in begun.items()}
        turns = TurnSizes(limit, starts)
    if isinstance(params, PolicyParams):
        check_draft(params)
        if is_drafting:
            check_number(params, config.drafters)
    checks.check_alive(params)
    params, engine = _engine_of(policy, params, config, mesh, session)
    if controller is None:
        name = (config.control, config.gammas, config.drafter)
        made = engine.defaults.get(name) or Controller(config.control, config.gammas)
        controller = engine.defaults.setdefault(name, made)
    checks.check_controller(controller, config)
    if session is not None:
        session.use(controller)
    request = request_of(
        arrays,
        ids,
        config,
        engine.layout.num_shards,
        begun={sequence: found.token_ids for sequence, found in begun.items()},
        ended=ended,
        turns=turns,
    )
    call = Call(
        params=params,
        prompts=arrays,
        sequence_ids=ids,
        request=request,
        engine=engine,
        controller=controller,
        resume=earlier,
        ended=ended,
        begun=begun,
        journal=journal,
        turned=turned,
    )
    if not engine.compiled:
        checks.check_parameters(policy, call.policy_params)
        if max(controller.gammas):
            checks.check_drafting(policy, params, config)
    slots = kv_cache.ring_slots(policy)
    if slots is not None and slots < request.cache_lengths[-1]:
        checks.check_window(controller.gammas)
        request = dataclasses.replace(request, ring_slots=slots)
    if not _can_draft_with_spans(call, config):
        drafts = {view.draft for view in request.views}
        views = tuple(View(draft) for draft in sorted(drafts))
        request = dataclasses.replace(request, views=views)
    drafters = config.drafters if is_drafting else ()
    kept_bytes = 0
    if session is not None and not isinstance(engine, MeshEngine):
        kept_bytes = session.prompts.limit_bytes
    limit_bytes = checks.check_memory(engine, params, request, drafters, kept_bytes)
    request = dataclasses.replace(request, state_limit_bytes=limit_bytes)
    return dataclasses.replace(call, request=request)


def _named(
    policy: Policy,
    params: Params | PolicyParams,
    prompts: Sequence[np.ndarray],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    key: np.ndarray | None,
    earlier: Rollout | None,
    respond: Respond | None,
) -> dict[str, Any]:
    """Return what decides the tokens of a call, but for the values of parameters.

    JSON values by names that an error can show. What only decides how fast they are
    sampled is left out.
    """
    policy_params = params.policy if isinstance(params, PolicyParams) else params
    shapes = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(policy_params)
    ]
    resumed = None
    if earlier is not None:
        arrays = (earlier.completion_ids, earlier.lengths, earlier.finish)
        resumed = array_digest(*arrays)
    return {
        "policy": f"{type(policy).__name__} of {policy.vocab_size} tokens",
        "shapes": array_digest(np.array(shapes)),
        "prompts": array_digest(*prompts),
        "sequence_ids": array_digest(sequence_ids),
        "key": np.asarray(key).tolist(),
        "resume": resumed,
        # Of the function itself nothing can be known.
        "respond": respond and [respond.max_turns, respond.max_turn_tokens],
        **{name: getattr(config, name) for name in DECIDING},
    }


def _can_draft_with_spans(call: Call, config: RolloutConfig) -> bool:
    """Whether the policy can draft with a part of the positions in sight.

    Found once per engine, and only where a program could make use of it.
    """
    request, engine = call.request, call.engine
    drafting = [gamma for gamma in call.controller.gammas if gamma]
    longest = request.cache_lengths[-1]
    offered = [view for g in drafting for view in request.views_at(longest, g)]
    if not any(view.window for view in offered):
        return True
    if "takes rings" not in engine.defaults:
        can = kv_cache.takes_rings(engine.policy, call.policy_params)
        engine.defaults["takes rings"] = can
    can = engine.defaults["takes rings"]
    stated = [d.window for d in config.drafters if d.window not in (None, "auto")]
    if not can and stated:
        warnings.warn(
            f"drafter.window={stated[0]} is not used: the policy handles "
            "the arrays of its cache itself, so drafts see all positions; use "
            "er_jax.kv_cache.write and attend in forward, or set window=None",
            RuntimeWarning,
            stacklevel=5,
        )
    return can


def _engine_of(
    policy: Policy,
    params: Params | PolicyParams,
    config: RolloutConfig,
    mesh: Mesh | None,
    session: Session | None,
) -> tuple[Params | PolicyParams, Engine]:
    """Return the parameters on the devices of the rollout, and its engine."""
    kept = None if session is None else session.engines
    if mesh is not None:
        mesh = layout.rollout_mesh(mesh)
        params = layout.put_on_mesh(policy, params, mesh)
    else:
        checks.check_placement(params)
    policy_params = params.policy if isinstance(params, PolicyParams) else params
    if mesh is None:
        engine = engine_for(
            policy, policy_params, config.accept, config.attention, kept
        )
        return params, engine
    (engine,) = mesh_engines_for(
        policy, config.accept, [(policy_params, mesh)], config.attention, kept
    )
    return params, engine


def topology_of(engine: Engine, params: PolicyParams, request: Request) -> Topology:
    """Return the layouts that a batch can have on the engine's devices."""
    if isinstance(engine, MeshEngine):
        return DataShards(engine, params, request)
    return OneDevice(engine, params, request)


def reuse_of(
    session: Session | None, call: Call, params: PolicyParams, stats: RolloutStats
) -> Reuse | None:
    """Return the prompts that a session keeps, for one device; else None.

    Args:
      params: those of the call, with a draft. stats: of the call, filled in.
    """
    if session is None or isinstance(call.engine, MeshEngine):
        return None
    cache, engine = session.prompts, call.engine
    owner = cache.owner(engine, params.policy)
    return Reuse(cache, owner, engine, params, stats)


def with_draft(call: Call, config: RolloutConfig, stats: RolloutStats) -> PolicyParams:
    """Return the parameters with a draft, derived now if none was given."""
    if isinstance(call.params, PolicyParams):
        return _uncommitted_codes(call.params)
    if not max(call.controller.gammas):
        return PolicyParams(policy=call.params, draft=None)
    engine = call.engine
    with stats.timed("draft refresh", lambda: engine.compile_s):
        params = engine.attach_draft(call.params, config.drafter)
        jax.block_until_ready(params.drafts)
    return params


def load_saved_costs(call: Call, params: PolicyParams) -> None:
    """Load saved costs into a controller that may draft and has timed nothing yet."""
    controller = call.controller
    with controller.measuring:
        table = controller.table
        is_empty = not table.seconds and table.passes is None
        if len(controller.gammas) > 1 and is_empty:
            found = store.load_costs(call.engine, params)
            controller.table = table if found is None else found
        if params.others:
            controller.table.weigh_drafts([device_bytes(d) for d in params.drafts])


def _uncommitted_codes(params: PolicyParams) -> PolicyParams:
    """Return the parameters with uncommitted 4-bit codes in the draft, on CPU.

    Compiled CPU programs refuse 4-bit codes that are committed to a device, as restored
    ones are: they ask for a layout that JAX gives no CPU array.
    """
    if jax.default_backend() != "cpu":
        return params

    def leaf(x: jax.Array) -> jax.Array:
        is_bound = isinstance(x, jax.Array) and x.dtype == jnp.int4 and x.committed
        return jnp.asarray(np.asarray(x)) if is_bound else x

    draft, *others = jax.tree.map(leaf, params.drafts)
    return PolicyParams(policy=params.policy, draft=draft, others=tuple(others))
