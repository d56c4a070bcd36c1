"""Starting sequences: their prompts' cache entries, copied or prefilled.

A row is admitted with its prompt's entries for all but the last token, which the first
round feeds, so the prefill needs no vocabulary projection. Long prompts are prefilled
in pieces: activations and scores are those of one piece.

A completion that goes on starts from its prompt, like any other, and its tokens so far
are appended (`go_on`): completions of a prompt share its prefill. A prompt that begins
as an earlier one did goes on from that one's entries (`extend`).

Left out: which sequence starts in which row (`scheduler.admission`), and which entries
are kept (`scheduler.prompts`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from er_jax import kv_cache
from er_jax.types import (
    NONE,
    Admission,
    Continuation,
    DecodeState,
    Finish,
    Params,
    Policy,
)

# Most tokens of a prompt that are prefilled at a time.
PIECE = 1024


def admit(
    policy: Policy, params: Params, state: DecodeState, admission: Admission
) -> DecodeState:
    """Start sequences in free slots: clone or prefill their prompts' entries.

    A prompt whose entries are still in some row is copied from there. Every other
    distinct prompt is prefilled once, in chunks of C prompts; a chunk's entries are
    written to every slot that starts from one of its prompts. The numbers of clones
    and chunks are traced, so one program serves any admission.

    Args:
      policy, params: the target.
      state: all of a row in `admission.slot` is overwritten.
      admission: see `types.Admission`.
    Returns:
      The state with the new rows live.
    """
    rows = state.rows
    num_tokens = admission.tokens.shape[1]
    chunk = admission.tokens.shape[0] // admission.first_row.shape[0]
    piece = min(num_tokens, PIECE)

    def clone(i: jax.Array, cache: kv_cache.Cache) -> kv_cache.Cache:
        source, to = admission.clone_from[i], admission.clone_to[i]
        count = admission.clone_length[i] - 1
        # A row that is copied onto itself keeps all of its entries.
        count = jnp.where(count < state.cache_length, count, NONE)
        return kv_cache.copy_row(cache, source, to, count)

    def prefill(index: jax.Array, cache: kv_cache.Cache) -> kv_cache.Cache:
        tokens = lax.dynamic_slice_in_dim(admission.tokens, index * chunk, chunk)
        known = lax.dynamic_slice_in_dim(admission.length, index * chunk, chunk)

        def prefill_piece(i: jax.Array, prefix: kv_cache.Cache) -> kv_cache.Cache:
            # The last piece may begin earlier, and write some entries once more.
            start = jnp.minimum(i * piece, num_tokens - piece)
            offsets = start + jnp.arange(piece, dtype=jnp.int32)[None]
            # The last prompt token is left to the first round.
            positions = jnp.where(offsets < known[:, None] - 1, offsets, NONE)
            part = lax.dynamic_slice_in_dim(tokens, start, piece, axis=1)
            return policy.forward(params, part, positions, prefix)[1]

        prefix = policy.init_cache(chunk, num_tokens)
        if piece == num_tokens:
            prefix = prefill_piece(jnp.int32(0), prefix)
        else:
            # Static: on a mesh all devices must run equally many passes.
            num_pieces = -(-num_tokens // piece)
            prefix = lax.fori_loop(0, num_pieces, prefill_piece, prefix)
        first = admission.first_row[index]

        def insert(i: jax.Array, cache: kv_cache.Cache) -> kv_cache.Cache:
            source = admission.prompt[i] - index * chunk
            return kv_cache.insert_row(
                cache, prefix, admission.slot[i], source, known[source] - 1
            )

        return lax.fori_loop(first, first + admission.num_rows[index], insert, cache)

    cache = lax.fori_loop(0, admission.num_clones, clone, state.cache)
    cache = lax.fori_loop(0, admission.num_chunks, prefill, cache)

    # Unused entries of `slot` are `rows`: out of bounds and therefore dropped.
    slot = admission.slot
    started = (slot < rows) & (slot >= 0)
    start_length = admission.length[admission.prompt]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot].set(new, mode="drop")

    prompts = kv_cache.resize(admission.tokens[admission.prompt], state.cache_length)
    return DecodeState(
        tokens=put(state.tokens, prompts),
        logprobs=put(state.logprobs, jnp.zeros_like(state.logprobs)),
        length=put(state.length, start_length),
        prompt_length=put(state.prompt_length, start_length),
        limit=put(state.limit, admission.limit),
        sequence_id=put(state.sequence_id, admission.sequence_id),
        live=put(state.live, started),
        finish_reason=put(state.finish_reason, jnp.zeros_like(state.finish_reason)),
        cache=cache,
    )


def go_on(
    policy: Policy,
    params: Params,
    state: DecodeState,
    continuation: Continuation,
    *,
    chunk: int,
    piece: int,
) -> DecodeState:
    """Append tokens to rows that have ended, or have just begun, and have them go on.

    Such a row holds the entries of all of its tokens but the last. So that one is fed,
    and the appended ones but the last.

    Args:
      policy, params: the target.
      state: rows in `continuation.slot` are live afterwards.
      continuation: see `types.Continuation`. chunk, piece: static; rows and tokens of
        each that are prefilled together. The tokens are a multiple of `piece`.
    """
    offsets = jnp.arange(continuation.tokens.shape[1], dtype=jnp.int32)[None]
    # Unused entries of `slot` are B: their rows are the last one's, and are dropped.
    index = jnp.minimum(continuation.slot, state.rows - 1)
    length = state.length[index]
    before = jnp.take_along_axis(
        state.tokens[index], jnp.maximum(length - 1, 0)[:, None], axis=1
    )
    fed = jnp.concatenate([before, continuation.tokens[:, :-1]], axis=1)
    is_token = offsets < continuation.count[:, None]
    positions = jnp.where(is_token, length[:, None] - 1 + offsets, NONE)

    def part(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * chunk, chunk)

    def run(i: jax.Array, cache: kv_cache.Cache) -> kv_cache.Cache:
        def run_piece(j: jax.Array, rows: kv_cache.Cache) -> kv_cache.Cache:
            own, at = (
                lax.dynamic_slice_in_dim(part(x, i), j * piece, piece, axis=1)
                for x in (fed, positions)
            )
            return policy.forward(params, own, at, rows)[1]

        rows = kv_cache.take_rows(cache, part(index, i))
        most = jnp.max(part(continuation.count, i))
        rows = lax.fori_loop(0, (most + piece - 1) // piece, run_piece, rows)
        slot = part(continuation.slot, i)
        return jax.tree.map(
            lambda leaf, new: leaf.at[slot].set(new, mode="drop"), cache, rows
        )

    cache = lax.fori_loop(0, continuation.num_chunks, run, state.cache)
    slot, length = continuation.slot, length + continuation.count

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot].set(new, mode="drop")

    at = jnp.where(positions == NONE, NONE, positions + 1)
    tokens = kv_cache.write(state.tokens[index], continuation.tokens, at)
    return DecodeState(
        tokens=put(state.tokens, tokens),
        logprobs=state.logprobs,
        length=put(state.length, length),
        prompt_length=put(state.prompt_length, length),
        limit=put(state.limit, continuation.limit),
        sequence_id=state.sequence_id,
        live=put(state.live, jnp.ones_like(slot, jnp.bool_)),
        finish_reason=put(state.finish_reason, jnp.full_like(slot, Finish.RUNNING)),
        cache=cache,
    )


def extend(
    policy: Policy,
    params: Params,
    entries: kv_cache.Cache,
    tokens: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    length: int,
) -> kv_cache.Cache:
    """Return the first `count` entries of a prompt, of which `start` are known.

    Args:
      policy, params: the target.
      entries: leaves `[1, T', ...]`; those from `start` on are another prompt's.
      tokens: int32 `[1, R]`, the prompt's from position `start` on, padded at the end.
      start, count: int32 `[]`, count - start <= R.
      length: T, static; positions of the result, at least `count`.
    Returns:
      Leaves `[1, T, ...]`, zero from `count` on.
    """
    known = kv_cache.copy_row(entries, jnp.int32(0), jnp.int32(0), start)
    piece = min(tokens.shape[1], PIECE)

    def run_piece(i: jax.Array, cache: kv_cache.Cache) -> kv_cache.Cache:
        offsets = i * piece + jnp.arange(piece, dtype=jnp.int32)[None]
        positions = jnp.where(start + offsets < count, start + offsets, NONE)
        part = lax.dynamic_slice_in_dim(tokens, i * piece, piece, axis=1)
        return policy.forward(params, part, positions, cache)[1]

    cache = kv_cache.resize(known, length)
    num_pieces = (count - start + piece - 1) // piece
    return lax.fori_loop(0, num_pieces, run_piece, cache)
