"""Deliberate mistakes, each with the test that has to fail because of it.

Every one of them would be silent: the library would go on and return tokens. They are
planted one at a time, and only the named tests run; a bug is caught when one of them
fails on an assertion. Without any bug all of them must pass.

    python -m tests.planted_bugs              # all of them, as a table
    python -m tests.planted_bugs residual     # those with this word in their name
    python -m tests.planted_bugs --without    # the named tests without any bug
"""

from __future__ import annotations

import argparse
import sys

from tests.planting import PlantedBug, run_tests

INTEGRATIONS = (
    "tests/test_integrations.py::test_the_quantized_kernels_are_what_is_multiplied"
)
DAMAGE = "tests/test_train_damage.py"
KERNELS = "tests/test_kernels.py"
LONG_CACHE = "tests/test_kv_cache.py::test_attention_to_a_long_cache_equals_the_oracle"
ENUMERATION = "tests/test_acceptance.py::test_every_outcome_adds_up_to_the_target"
ROUND = "tests/test_lossless.py::test_every_outcome_of_a_round"
DRAWS = "tests/test_lossless.py::test_coupled_emits_the_targets_own_draws"
COMPLETIONS = "tests/test_lossless.py::test_completions_follow_the_target"
UNSOUND = "tests/test_unsound.py::test_a_drafted_token_ends_no_row"
LEAKS = "tests/test_lossless.py::test_entries_of_drafts_that_are_no_number_bias_nothing"
TUNIX = "tests/test_tunix.py"
SPANS = "tests/test_spans.py"
DRAFTS = "tests/test_several_drafts.py"
RESUME = "tests/test_resume.py"
SHARED_PREFILL = f"{RESUME}::test_completions_of_a_prompt_share_its_prefill"
TURNS = "tests/test_turns.py"
SCORED_TURNS = "test_scores_are_those_of_sampled_tokens_behind_appended_ones"
CALLS = f"{TURNS}::test_tokens_are_those_of_calls_turn_by_turn"
EXCHANGE = "tests/test_exchange.py"
STREAM, JOURNAL = "tests/test_stream.py", "tests/test_journal.py"
SESSION = "tests/test_session.py"
LIVING = "tests/test_living.py::test_some_hundred_events"
LIVES = "tests/test_living.py::test_lives_drawn_at_random"
KILLED = "tests/test_killed.py::test_every_signal_loses_nothing"
SETTINGS = "tests/test_settings.py"
LOSSLESS_SETTINGS = "tests/test_lossless_settings.py"
LOWERING = "tests/test_lowering.py"
SCORE_TESTS = "tests/test_score.py"
SCORES = f"{SCORE_TESTS}::test_scores_are_the_rollouts_own"
LEFT_OUT = "test_tokens_that_truncation_leaves_out_count_as_kept"
LORA, PEFT = "tests/test_lora.py", "tests/test_peft.py"
TRAIN_LORA = "tests/test_train_lora.py"
PARTIAL = "tests/test_train_partial.py"
TOOLS = "tests/test_train_tools.py"
PARTIAL_STEPS = f"{PARTIAL}::test_all_is_learnt_once_from_what_was_recorded[1]"
SPANNED = "tests/test_lossless.py::test_drafts_that_see_a_span_change_no_distribution"
CLOSED_FORM = (
    "tests/test_lossless.py::test_kept_drafts_are_as_many_as_the_closed_form_says"
)

BUGS: tuple[PlantedBug, ...] = (
    # -- acceptance: the mathematics
    PlantedBug(
        "acceptance ratio upside down",
        "er_jax::token_accept_probs",
        "_at_tokens(target, draft_tokens) - _at_tokens(draft, draft_tokens)",
        "_at_tokens(draft, draft_tokens) - _at_tokens(target, draft_tokens)",
        (f"{ENUMERATION}[token-1]",),
    ),
    PlantedBug(
        "no residual: drawn from the target after a rejection",
        "er_jax::residual_logprobs",
        "excess = _positive_part(weight, own, proposed)",
        "excess = jnp.exp(own)",
        (f"{ENUMERATION}[token-1]",),
    ),
    PlantedBug(
        "residual of draft minus target",
        "er_jax::residual_logprobs",
        "excess = _positive_part(weight, own, proposed)",
        "excess = _positive_part(weight, proposed, own)",
        (f"{ENUMERATION}[token-2]",),
    ),
    PlantedBug(
        "residual without the weight of the block",
        "er_jax::residual_logprobs",
        "excess = _positive_part(weight, own, proposed)",
        "excess = _positive_part(jnp.ones_like(weight), own, proposed)",
        (f"{ENUMERATION}[block-2]",),
    ),
    PlantedBug(
        "bonus token from a residual",
        "er_jax::residual_logprobs",
        "num_accepted == num_drafts",
        "num_accepted > num_drafts",
        (f"{ENUMERATION}[token-1]",),
    ),
    PlantedBug(
        "block weights not clipped at 1",
        "er_jax::block_accept_probs",
        "jnp.minimum(one, weights[-1] * ratio[:, i])",
        "weights[-1] * ratio[:, i]",
        (f"{ENUMERATION}[block-2]",),
    ),
    PlantedBug(
        "block keeps the leading passes only",
        "er_jax::block_num_accepted",
        "return jnp.max(jnp.where(passed, length[None], 0), axis=-1)",
        "return count_leading(passed)",
        (f"{ENUMERATION}[block-3]",),
    ),
    # -- acceptance: the noise
    PlantedBug(
        "residual drawn with the noise of the draft",
        "er_jax::_accept",
        "Purpose.RESIDUAL",
        "Purpose.DRAFT",
        (f"{COMPLETIONS}[token]",),
    ),
    PlantedBug(
        "noise of rejected drafts met again in the next round",
        "er_jax::_draft",
        """
        sampling.gumbel(
            settings, state.sequence_id, position, logits.shape[-1], logits.dtype,
            purpose=Purpose.DRAFT, start=state.length,
        )
        """,
        """
        sampling.gumbel(
            settings, state.sequence_id, state.length + depth,
            logits.shape[-1], logits.dtype, purpose=Purpose.DRAFT,
        )
        """,
        (f"{COMPLETIONS}[block]",),
    ),
    PlantedBug(
        "block acceptance numbers met again in the next round",
        "er_jax::_accept",
        """
        sampling.uniform(
            settings, state.sequence_id[:, None], start[:, None] + offsets[:, :-1],
            target.dtype, purpose=Purpose.ACCEPT, start=start[:, None],
        )
        """,
        """
        sampling.uniform(
            settings, state.sequence_id[:, None], start[:, None] + offsets[:, :-1],
            target.dtype, purpose=Purpose.ACCEPT,
        )
        """,
        (f"{COMPLETIONS}[block]",),
    ),
    PlantedBug(
        "noise named by the place in the round",
        "er_jax::decode_round",
        "position = state.length[:, None] + _offsets(gamma + 1)",
        "position = 0 * state.length[:, None] + _offsets(gamma + 1)",
        (f"{DRAWS}[1]",),
    ),
    PlantedBug(
        "draft and target couple with noise of neighbouring positions",
        "er_jax::_draft",
        "noise = _token_noise(state, settings, logits, position)",
        "noise = _token_noise(state, settings, logits, position + 1)",
        (f"{CLOSED_FORM}[coupled]",),
    ),
    PlantedBug(
        "noise not folded with the sequence id",
        "er_jax::_stream",
        "jnp.broadcast_to(sequence_id.astype(jnp.uint32), shape)",
        "jnp.zeros(shape, jnp.uint32)",
        ("tests/test_sampling.py::test_every_counter_matters",),
    ),
    PlantedBug(
        "purposes share their noise",
        "er_jax::_stream",
        "position.astype(jnp.uint32) * jnp.uint32(len(Purpose)) + purpose",
        "position.astype(jnp.uint32) + purpose",
        ("tests/test_sampling.py::test_no_two_counters_share_noise",),
    ),
    PlantedBug(
        "rare draws rounded to 24 bits",
        "er_jax::_open_unit",
        "unit = (bits.astype(dtype) + 0.5) * 2.0**-32",
        "unit = ((bits >> 8).astype(dtype) + 0.5) * 2.0**-24",
        ("tests/test_sampling.py::test_rare_noise_has_all_32_bits",),
    ),
    # -- the target
    PlantedBug(
        "top-p keeps one token too few",
        "er_jax::_truncated",
        "is_kept = _keys(scores) <= jnp.minimum(by_rank, nucleus)",
        """
        keys = _keys(scores)
        is_kept = (keys <= by_rank) & ((keys < nucleus) | (keys == 0))
        """,
        ("tests/test_sampling.py::test_truncation_keeps_ties",),
    ),
    PlantedBug(
        "top-k keeps one token too many",
        "er_jax::_truncated",
        "count(scores, last) >= top_k",
        "count(scores, last) > top_k",
        ("tests/test_sampling.py::test_truncation_keeps_ties",),
    ),
    PlantedBug(
        "temperature after the truncation",
        "er_jax::_kept_scores",
        "scores = _truncated(scores, sampling)",
        """
        cold = _truncated(logits - jnp.max(logits, -1, keepdims=True), sampling)
        scores = _temperature_scaled(cold, _best(cold), sampling)
        """,
        ("tests/test_sampling.py::test_truncation_keeps_ties",),
    ),
    PlantedBug(
        "truncation that the window's name leaves out",
        "er_jax::Engine._window_name",
        "compiled_in = (len(settings.stop_ids), sampling.is_truncated(settings))",
        "compiled_in = (len(settings.stop_ids),)",
        ("tests/test_programs.py::test_truncation_is_one_more_window",),
    ),
    PlantedBug(
        "greedy decoding with noise",
        "er_jax::draw",
        "noised = jnp.where(is_greedy, scores, scores + noise)",
        "noised = scores + noise",
        ("tests/test_sampling.py::test_draws_are_the_best_of_logprobs_plus_noise",),
    ),
    PlantedBug(
        "log-probability of a certain token normalised",
        "er_jax::drawn_logprobs",
        "is_certain = _is_certain(sampling, logprobs)",
        "is_certain = jnp.zeros((), jnp.bool_)",
        ("tests/test_sampling.py::test_draws_are_the_best_of_logprobs_plus_noise",),
    ),
    PlantedBug(
        "draft without truncation",
        "er_jax::_draft",
        "token = sampling.draw(logits, settings, noise, truncated)",
        "token = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)",
        ("tests/test_lossless.py::test_draft_equal_to_the_target_keeps_all[coupled]",),
    ),
    PlantedBug(
        "log-probability of the draft",
        "er_jax::decode_round",
        "logprobs = sampling.drawn_logprobs(logits, emitted, settings, truncated)",
        """
        hidden, _ = policy.forward(draft_params(params), tokens, positions, cache)
        logits = policy.logits(draft_params(params), hidden)
        logprobs = sampling.drawn_logprobs(logits, emitted, settings, truncated)
        """,
        ("tests/test_lossless.py::test_logprobs_are_the_targets[coupled]",),
    ),
    PlantedBug(
        "log-probability before the temperature",
        "er_jax::_unprocessed",
        "scaled = _temperature_scaled(values, best, sampling)",
        "scaled = _below_best(values, best)",
        ("tests/test_sampling.py::test_token_logprobs_by_each_meaning",),
    ),
    PlantedBug(
        "score of a token relative to itself",
        "er_jax::_of_tokens",
        "return _unprocessed(own, _best(logits), sampling)[..., 0]",
        "return _unprocessed(own, _best(own), sampling)[..., 0]",
        ("tests/test_sampling.py::test_token_logprobs_by_each_meaning",),
    ),
    # -- scoring
    PlantedBug(
        "scores of the token after the next",
        "er_jax::scored",
        "hidden[:, -width:]",
        "jnp.roll(hidden, 1, axis=1)[:, -width:]",
        (f"{SCORES}[temperature]",),
    ),
    PlantedBug(
        "scores before the temperature",
        "er_jax::score",
        "settings = sampling_of(config, np.zeros(2, np.uint32), policy.vocab_size)",
        """
        settings = sampling_of(config, np.zeros(2, np.uint32), policy.vocab_size)
        settings = settings.replace(temperature=np.float32(1))
        """,
        (f"{SCORES}[temperature]",),
    ),
    PlantedBug(
        "scores that attend to padding",
        "er_jax::_sequences",
        "jnp.where(is_token, positions, NONE)",
        "jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)",
        (f"{SCORES}[temperature]",),
    ),
    PlantedBug(
        "scores of what top-k and top-p left out",
        "er_jax::score",
        'is_truncated = config.logprobs == "processed"'
        " and sampling.is_truncated(settings)",
        "is_truncated = False",
        (f"{SCORES}[top-k and top-p]",),
    ),
    PlantedBug(
        "scores truncated before the temperature",
        "er_jax::_score",
        "scores = _scores_of_kind(logits, sampling, truncated)",
        """
        scores = _scores_of_kind(logits, sampling, False)
        cold = _below_best(logits, _best(logits))
        cold = _truncated(cold, sampling) if truncated else scores
        scores = jnp.where(cold == never, never, scores)
        """,
        (f"{SCORES}[top-k and top-p]",),
    ),
    PlantedBug(
        "a drawn token left out by truncation has probability 0",
        "er_jax::_score",
        "added = jnp.where(pick(scores) == never, jnp.exp(own), zero)",
        "added = zero",
        (f"{SCORE_TESTS}::{LEFT_OUT}[processed]",),
    ),
    PlantedBug(
        "gradient without the temperature",
        "er_jax::_score",
        "scale = one / jnp.where(is_scaled, temperature, one)",
        "scale = jnp.where(is_scaled, one, one)",
        (f"{SCORE_TESTS}::{LEFT_OUT}[temperature]",),
    ),
    PlantedBug(
        "gradients of pieces summed in bfloat16",
        "er_jax::_is_narrow",
        "return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4",
        "return False",
        (f"{SCORE_TESTS}::test_gradients_of_many_pieces_are_summed_wide",),
    ),
    PlantedBug(
        "logits of a whole chunk at once",
        "er_jax::scored",
        "most = max(most_logits // len(tokens), 1)",
        "most = width",
        (f"{SCORE_TESTS}::test_no_logits_of_all_tokens_exist[False]",),
    ),
    PlantedBug(
        "tokens that are context are scored",
        "er_jax::_sequences",
        "is_scored = completion_mask.astype(bool) & (offsets < lengths)",
        "is_scored = offsets < lengths",
        (f"{SCORE_TESTS}::test_tokens_that_were_not_sampled_are_context",),
    ),
    # -- drafts that see a span
    PlantedBug(
        "ring entry one slot off",
        "er_jax::_slots",
        "recent = head + (positions - head) % (size - head)",
        "recent = head + (positions - head + 1) % (size - head)",
        (f"{SPANS}::test_a_ring_shows_the_span_and_nothing_else[2+3]",),
    ),
    PlantedBug(
        "head of a ring overwritten",
        "er_jax::_slots",
        "recent = head + (positions - head) % (size - head)",
        "recent = positions % size",
        (f"{SPANS}::test_a_ring_shows_the_span_and_nothing_else[2+3]",),
    ),
    PlantedBug(
        "ring entry seen that left the window",
        "er_jax::visible",
        "newest > at - span.window",
        "newest >= at - span.window",
        (f"{SPANS}::test_a_ring_shows_the_span_and_nothing_else[0+5]",),
    ),
    PlantedBug(
        "ring too short for the drafts of a round",
        "er_jax::Span.ring_length",
        "return -(-needed // RING_STEP) * RING_STEP",
        "return self.head + self.window",
        (f"{SPANS}::test_a_ring_shows_the_span_and_nothing_else[0+5]",),
    ),
    PlantedBug(
        "ring begun with the entry of a rejected draft",
        "er_jax::rings",
        "last = jnp.asarray(length) - 2",
        "last = jnp.asarray(length) - 1",
        (f"{SPANS}::test_rings_are_made_of_what_is_known",),
    ),
    PlantedBug(
        "ring begun one entry off",
        "er_jax::_held",
        "recent = jnp.roll(recent, (first - span.head) % num_recent, axis=0)",
        "recent = jnp.roll(recent, (first - span.head + 1) % num_recent, axis=0)",
        (
            f"{SPANS}::test_a_ring_shows_the_span_and_nothing_else[2+3]",
            f"{SPANS}::test_drafts_are_those_of_masked_attention[2+3]",
        ),
    ),
    PlantedBug(
        "ring keeps the entries of drafts",
        "er_jax::decode_round",
        "kv_cache.update_rings(state.draft_cache, state.cache, positions)",
        "state.draft_cache",
        (f"{SPANNED}[coupled]",),
    ),
    PlantedBug(
        "verification reading the ring",
        "er_jax::_verify.run",
        "new, cache = policy.forward(params, tokens, fed, cache)",
        """
        seen = state.draft_cache or cache
        new = policy.forward(params, tokens, fed, seen)[0]
        cache = policy.forward(params, tokens, fed, cache)[1]
        """,
        (f"{SPANS}::test_a_span_changes_no_token[2+3]",),
    ),
    PlantedBug(
        "span that the window's name leaves out",
        "er_jax::Engine._window_name",
        '("window", *sizes, *compiled_in, kind, program.span, *kinds(settings))',
        '("window", *sizes, *compiled_in, kind, *kinds(settings))',
        (f"{SPANS}::test_a_program_of_spans_is_another_one",),
    ),
    PlantedBug(
        "acceptance of a span taken for that of all positions",
        "er_jax::RolloutRecord.of",
        "view == FIRST_DRAFT",
        "True",
        (f"{SPANS}::test_the_controller_takes_the_faster_kind",),
    ),
    PlantedBug(
        "another draft run than the program names",
        "er_jax::Batch.start_window",
        "self.topology.params_of(shared).only(program.draft)",
        "self.topology.params_of(shared).only(0)",
        (f"{DRAFTS}::test_each_draft_is_the_one_that_its_program_names",),
    ),
    PlantedBug(
        "a draft of few bytes taken for the first one",
        "er_jax::LatencyTable._of_draft",
        "first_s - (1 - share) * drafts_s",
        "first_s",
        (f"{DRAFTS}::test_a_draft_that_never_ran_is_predicted_by_its_bytes",),
    ),
    # -- what a request may say
    PlantedBug(
        "settings of rows stay where they are when rows move",
        "er_jax::Batch.start_window",
        "of_rows(self.settings, self.rows.sequence)",
        "of_rows(self.settings, np.arange(len(self.rows)))",
        (f"{SETTINGS}::test_each_prompt_has_its_own[not truncated-best]",),
    ),
    PlantedBug(
        "rows without top-p lose what rounding hides",
        "er_jax::_truncated",
        "jnp.where(is_on, found, all_of(scores))",
        "found",
        ("tests/test_sampling.py::test_rows_with_settings_of_their_own",),
    ),
    PlantedBug(
        "limits of prompts are that of the first",
        "er_jax::Request.most_tokens",
        "int(self.limits[sequence])",
        "int(self.limits[0])",
        (f"{SETTINGS}::test_each_prompt_has_its_own[not truncated-ar]",),
    ),
    PlantedBug(
        "bias in the verification only",
        "er_jax::_draft",
        "logits = _biased(state, settings, logits, depth)",
        "",
        (f"{LOSSLESS_SETTINGS}::test_coupled_emits_the_targets_own_draws[4]",),
    ),
    PlantedBug(
        "bias in the draft only",
        "er_jax::decode_round",
        "drawn_from = _biased(state, settings, logits)",
        "drawn_from = logits",
        (f"{LOSSLESS_SETTINGS}::test_every_outcome_of_a_round[token]",),
    ),
    PlantedBug(
        "bias in log-probabilities of all kinds",
        "er_jax::of_kind",
        "jnp.where(is_processed, drawn, logits)",
        "drawn",
        (f"{SETTINGS}::test_other_kinds_of_logprobs_know_no_bias[raw]",),
    ),
    PlantedBug(
        "least length one token too long for stop ids",
        "er_jax::biased",
        "position - begin < least",
        "position - begin <= least",
        (f"{LOSSLESS_SETTINGS}::test_every_outcome_of_a_round[token]",),
    ),
    PlantedBug(
        "least length one token too long for stop sequences",
        "er_jax::ends",
        "made >= settings.min_new_tokens[:, None]",
        "made > settings.min_new_tokens[:, None]",
        (f"{SETTINGS}::test_stop_sequences_and_least_lengths_when_going_on",),
    ),
    PlantedBug(
        "least length counted from where a row goes on",
        "er_jax::Request.with_begins",
        "self.begin(s)",
        "len(self.prompts[self.prompt_of[s]])",
        (f"{SETTINGS}::test_stop_sequences_and_least_lengths_when_going_on",),
    ),
    PlantedBug(
        "scores with the least length of the token before",
        "er_jax::_turn_index",
        "index - lax.cummax(begins, axis=1)",
        "index - lax.cummax(begins, axis=1) - 1",
        (f"{SETTINGS}::test_bias_bans_and_least_lengths[ar]",),
    ),
    PlantedBug(
        "stop sequence that rounds cut is missed",
        "er_jax::ends",
        "jnp.where(before >= settings.begin[:, None], known, OUTSIDE)",
        "jnp.full_like(known, OUTSIDE)",
        (f"{LOSSLESS_SETTINGS}::test_a_stop_sequence_across_rounds[coupled-2]",),
    ),
    PlantedBug(
        "stop sequence that begins in the prompt",
        "er_jax::ends",
        "before >= settings.begin[:, None]",
        "before >= 0",
        (f"{LOSSLESS_SETTINGS}::test_a_stop_sequence_across_rounds[coupled-2]",),
    ),
    # -- going on from an earlier rollout
    PlantedBug(
        "tokens so far counted twice against the limit",
        "er_jax::Request.begin",
        "known - self.num_begun.get(sequence, 0)",
        "known",
        (f"{RESUME}::test_what_has_begun_is_part_of_the_prompt",),
    ),
    PlantedBug(
        "pieces of appended tokens that all begin at the first",
        "er_jax::go_on",
        "j * piece",
        "0 * j",
        (f"{SHARED_PREFILL}[pieces-8]",),
    ),
    PlantedBug(
        "completions that go on from their prompts alone",
        "er_jax::Batch.refill",
        "self._go_on({s: row for row, s in rows if s in begun})",
        "self._go_on({})",
        (f"{SHARED_PREFILL}[at once-8]",),
    ),
    PlantedBug(
        "prompts of completions that go on prefilled with what is behind them",
        "er_jax::Request.starting",
        "bare and self.num_begun",
        "False",
        (f"{SHARED_PREFILL}[at once-8]",),
    ),
    PlantedBug(
        "a completion without the tokens it began with",
        "er_jax::Batch._completion",
        "begun is None",
        "True",
        (f"{RESUME}::test_going_on_equals_never_having_stopped",),
    ),
    PlantedBug(
        "tokens of an earlier call given the number of this one",
        "er_jax::assemble",
        "np.where(old == NONE, versions[:, :known], old)",
        "versions[:, :known]",
        (f"{RESUME}::test_nothing_is_sampled_where_all_has_ended",),
    ),
    # -- lives of completions over many calls
    PlantedBug(
        "life: a resumed completion loses its last token",
        "er_jax::request_of",
        "np.concatenate([prompts[sequence // config.n], tokens])",
        "np.concatenate([prompts[sequence // config.n], tokens[:-1]])",
        (LIVING,),
    ),
    PlantedBug(
        "life: Ctrl-C forgets what had ended in an earlier call",
        "er_jax::_interruption",
        "call.request.waiting",
        "range(len(call.sequence_ids))",
        (LIVING,),
    ),
    PlantedBug(
        "life: what waits for a higher limit counts as ended",
        "er_jax::completions_of",
        "UNFINISHED if goes_on else reason",
        "reason",
        (LIVES,),
    ),
    PlantedBug(
        "life: who ends without another token is not told of",
        "er_jax::Call.told_at_once",
        "c.finish_reason != before[s]",
        "False",
        (LIVING,),
    ),
    PlantedBug(
        "life: an answer is behind the row of another sequence",
        "er_jax::plan_going_on",
        "slot[i], count[i] = row, len(appended)",
        "slot[i], count[i] = held[max(held)], len(appended)",
        (LIVES,),
    ),
    PlantedBug(
        "life: what goes on has no token of this call",
        "er_jax::Conversations.unfinished",
        "{**(self.turns.open if is_mine else {}), **super().unfinished()}",
        "{**self.turns.open, **super().unfinished(), **self.begun}",
        (LIVING,),
    ),
    PlantedBug(
        "life: entries of earlier parameters used after new ones",
        "er_jax::Owner.has",
        "known is not None and known() is leaf",
        "known is not None",
        (LIVING,),
    ),
    PlantedBug(
        "life: a turn refused at its limit goes on in a journal",
        "er_jax::completions_of",
        "row not in over",
        "True",
        (f"{TURNS}::test_a_turn_that_got_no_answer_is_the_last_in_a_journal_too",),
    ),
    # -- processes that end
    PlantedBug(
        "kill: Ctrl-C loses all rows while a program has the state",
        "er_jax::Batch.unfinished",
        "x.is_deleted()",
        "False",
        ("tests/test_resume.py::test_ctrl_c_while_a_program_has_the_state",),
    ),
    PlantedBug(
        "kill: Ctrl-C in a window or a prefill gives nothing",
        "er_jax::Batch.unfinished",
        "self._last is None",
        "True",
        (KILLED,),
    ),
    PlantedBug(
        "kill: Ctrl-C at the end closes the journal under its thread",
        "er_jax::_Writer.end",
        "self._is_over.wait()",
        "None",
        (f"{JOURNAL}::test_ctrl_c_at_the_end_waits_for_the_journal",),
    ),
    PlantedBug(
        "kill: the journal has an answer that Ctrl-C does not give",
        "er_jax::Conversations.take_answers",
        "self.completions |= ended",
        """
        self.completions |= ended
        if self.journal is not None:
            self.journal.note(found, sync=False)
        """,
        (f"{TURNS}::test_ctrl_c_while_answers_are_taken",),
    ),
    # -- conversations
    PlantedBug(
        "what a tool appended taken for sampled",
        "er_jax::Completion.answered",
        "np.zeros(len(token_ids), bool)",
        "np.ones(len(token_ids), bool)",
        (f"{CALLS}[ar-8-2]",),
    ),
    PlantedBug(
        "a turn answered by what another sequence was told",
        "er_jax::Turns.answered",
        "self._ended_or_gone_on(request, sequence, told)",
        "self._ended_or_gone_on(request, sequence, answers[0][1])",
        (f"{TURNS}::test_an_answer_goes_to_who_asked",),
    ),
    PlantedBug(
        "turns that end a token too soon",
        "er_jax::spans_of",
        "(int(start), int(end))",
        "(int(start), int(end) - 1)",
        (f"{TURNS}::test_what_a_function_is_told",),
    ),
    PlantedBug(
        "room for an answer that what was appended before does not count in",
        "er_jax::Turns.takes",
        "room = request.most_tokens(sequence) - length",
        "room = request.most_tokens(sequence) - int(completion.mask.sum())",
        (f"{TURNS}::test_limits_of_turns_and_of_all_tokens",),
    ),
    PlantedBug(
        "a limit of a completion that counts from its turn",
        "er_jax::Request.going_on",
        "num_begun[sequence] = starts[sequence] = len(tokens)",
        "starts[sequence] = len(tokens)",
        (f"{TURNS}::test_an_answer_goes_to_who_asked",),
    ),
    PlantedBug(
        "bounds of stops that count from the beginning of the conversation",
        "er_jax::Request.with_begins",
        "self.begin(s) + starts.get(s, 0)",
        "self.begin(s)",
        (f"{CALLS}[ar-8-2]",),
    ),
    PlantedBug(
        "a row that goes on without the entry of its last token",
        "er_jax::go_on",
        "length[:, None] - 1 + offsets",
        "length[:, None] + offsets",
        (f"{CALLS}[ar-8-2]",),
    ),
    PlantedBug(
        "scores whose bounds of stops count from the beginning of the conversation",
        "er_jax::_turn_index",
        "index - lax.cummax(begins, axis=1)",
        "index",
        (f"{TURNS}::{SCORED_TURNS}",),
    ),
    PlantedBug(
        "appended tokens that a journal takes for sampled",
        "er_jax::pieces_of",
        "np.where(completion.mask, version, NONE)",
        "np.full(len(completion.mask), version)",
        (f"{TURNS}::test_pieces_of_a_journal_tell_what_was_appended",),
    ),
    PlantedBug(
        "answers that the other processes are not told",
        "er_jax::answers_of_leader",
        "not (count and agreement.is_spread)",
        "not (count and agreement.is_leader)",
        (f"{EXCHANGE}::test_all_are_told_what_the_leader_was_answered",),
    ),
    PlantedBug(
        "a failure of one process that its next meeting does not hear of",
        "er_jax::answers_of_leader",
        "agreement.sync_or_raise([len(answers)], failure)",
        "agreement.sync_or_raise([len(answers)])",
        (f"{EXCHANGE}::test_a_failure_of_one_is_raised_in_all",),
    ),
    PlantedBug(
        "tokens of another process told in the place of another row",
        "er_jax::rows_of_all",
        "slice(int(end - length), int(end))",
        "slice(int(ends[0] - length), int(ends[0]))",
        (f"{EXCHANGE}::test_all_are_told_the_tokens_of_rows_that_one_holds",),
    ),
    PlantedBug(
        "what was appended not told with a completion",
        "er_jax::assemble",
        "np.where(completion.mask, ids, ~ids)",
        "ids",
        (f"{CALLS}[ar-8-2]",),
    ),
    # -- streams and journals
    PlantedBug(
        "a group given out before its last member",
        "er_jax::_Groups.add",
        "len(members) == self.n",
        "len(members) == self.n - 1",
        (f"{STREAM}::test_groups_are_whole_and_given_once",),
    ),
    PlantedBug(
        "a stream deaf to the stop of its caller",
        "er_jax::_AnyStop.is_set",
        "any(stop.is_set for stop in self._stops)",
        "all(stop.is_set for stop in self._stops)",
        (f"{STREAM}::test_until_and_its_stop_are_heard",),
    ),
    PlantedBug(
        "a thread with JAX's settings of the process, not of its caller",
        "er_jax::ThreadSettings.call",
        "jax.config.values[name] != value",
        "False",
        (f"{STREAM}::test_a_thread_has_the_settings_of_its_caller",),
    ),
    PlantedBug(
        "a journal of other parameters gone on with",
        "er_jax::Journal.confirm",
        'self._compare({"params": params_digest})',
        "None",
        (f"{JOURNAL}::test_a_journal_of_another_request_is_refused[-params]",),
    ),
    PlantedBug(
        "a record read without its checksum",
        "er_jax::_record_at",
        "(kind, body) if _checksum(kind, body) == checksum else None",
        "(kind, body)",
        (f"{JOURNAL}::test_every_flip_is_found",),
    ),
    PlantedBug(
        "a torn tail read as a whole record",
        "er_jax::contents_of",
        "end = start + HEAD.size + len(read[1])",
        "end = len(data)",
        (f"{JOURNAL}::test_every_cut_keeps_what_is_whole",),
    ),
    PlantedBug(
        "tokens put behind others that were lost",
        "er_jax/journal_format::joined",
        "not 0 <= overlap <= len(piece.token_ids)",
        "not overlap <= len(piece.token_ids)",
        (f"{JOURNAL}::test_nothing_is_put_behind_a_piece_that_is_missing",),
    ),
    PlantedBug(
        "tokens of a row that runs one window older than their log-probabilities",
        "er_jax::Batch.collect",
        "tokens[: info.length[slot]]",
        """
        np.where(
            np.arange(len(tokens)) < self._finished.length[slot] * info.live[slot]
            + len(tokens) * ~info.live[slot],
            tokens, 0,
        )[: info.length[slot]]
        """,
        (f"{JOURNAL}::test_what_is_noted_of_a_row_is_of_one_window",),
    ),
    PlantedBug(
        "a process that goes on from its own journal alone",
        "er_jax::Journal._pieces_of_all",
        "self._agreement.is_spread",
        "False",
        (f"{EXCHANGE}::test_what_any_journal_holds_all_go_on_from",),
    ),
    PlantedBug(
        "a finished completion that a journal as long does not hold finished",
        "er_jax::Journal.gone_on",
        "found[0].finish_reason != UNFINISHED",
        "False",
        (f"{EXCHANGE}::test_what_any_journal_holds_all_go_on_from",),
    ),
    PlantedBug(
        "a journal that keeps what another one had further",
        "er_jax::Journal._begin_file",
        "self._agreement.is_spread and self._agreed",
        "False",
        (f"{EXCHANGE}::test_what_any_journal_holds_all_go_on_from",),
    ),
    PlantedBug(
        "a process that goes on with a journal where another refuses its own",
        "er_jax::Journal._together",
        "self._agreement.gather_bytes(own.encode(errors='replace'))",
        "[own.encode(errors='replace')]",
        (f"{EXCHANGE}::test_what_one_journal_refuses_all_do",),
    ),
    PlantedBug(
        "what a journal holds not told to whoever is told of completions",
        "er_jax::Journal.gone_on",
        "known is not before",
        "False",
        (f"{JOURNAL}::test_a_stream_gives_what_it_holds_as_well",),
    ),
    # -- the round
    PlantedBug(
        "last token emitted one place too early",
        "er_jax::_accept",
        "jnp.where(offsets == num_accepted[:, None], final[:, None], padded)",
        "jnp.where(offsets + 1 == num_accepted[:, None], final[:, None], padded)",
        (f"{ROUND}[token-2-None]",),
    ),
    PlantedBug(
        "row advanced by gamma + 1",
        "er_jax::_emit",
        "num_emitted = jnp.where(state.live, jnp.minimum(wanted, num_finite), 0)",
        "num_emitted = jnp.where(state.live, emitted.shape[1], 0)",
        (f"{DRAWS}[1]",),
    ),
    PlantedBug(
        "stop token dropped",
        "er_jax::_emit",
        "wanted = jnp.minimum(num_accepted, first_stop) + 1",
        "wanted = jnp.minimum(num_accepted + 1, jnp.maximum(first_stop, 1))",
        ("tests/test_lossless.py::test_stop_inside_a_draft[good-coupled]",),
    ),
    PlantedBug(
        "stop seen in a token that was cut off",
        "er_jax::_emit",
        "first_stop < num_emitted",
        "first_stop <= num_emitted",
        ("tests/test_lossless.py::test_stop_at_the_limit_is_a_stop[coupled]",),
    ),
    PlantedBug(
        "limit exceeded by one",
        "er_jax::_emit",
        "wanted = jnp.minimum(wanted, state.limit - state.length)",
        "wanted = jnp.minimum(wanted, state.limit - state.length + 1)",
        ("tests/test_lossless.py::test_limit_inside_a_draft[good-coupled]",),
    ),
    PlantedBug(
        "cache entries of the draft left in place",
        "er_jax::_verify",
        "new, cache = policy.forward(params, tokens, fed, cache)",
        "new, _ = policy.forward(params, tokens, fed, cache)",
        ("tests/test_lossless.py::test_cache_holds_the_targets_entries[coupled]",),
    ),
    PlantedBug(
        "positions are fed behind the limit",
        "er_jax::_positions",
        "positions < state.limit[:, None] - 1",
        "positions < state.limit[:, None]",
        ("tests/test_unsound.py::test_the_last_token_is_never_fed",),
    ),
    PlantedBug(
        "drafts that make a row's numbers bad are verified once and believed",
        "er_jax::_verify",
        "return (turn == 0) | ((turn <= count) & is_more)",
        "return turn == 0",
        (f"{UNSOUND}[plain-coupled-4]",),
    ),
    PlantedBug(
        "entries of drafts stay while they are verified again",
        "er_jax::_verify",
        "is_bad & (turn == 1)",
        "is_bad & (turn == 0)",
        (f"{UNSOUND}[plain-coupled-4]",),
    ),
    PlantedBug(
        "entries of drafts that are no numbers are left behind",
        "er_jax::decode_round",
        "cache = _forget_from_last(state, is_bad)",
        "",
        (f"{LEAKS}[3-coupled]",),
    ),
    PlantedBug(
        "drafts are verified again one position too late",
        "er_jax::_verify",
        "offsets == turn - 1",
        "offsets == turn",
        (f"{UNSOUND}[plain-coupled-4]",),
    ),
    PlantedBug(
        "seconds are lost once for every program that was missed",
        "er_jax::Controller._choose",
        "self._accounts.settle(bought, best_ready, self._speeds)",
        "",
        ("tests/test_control.py::test_seconds_are_lost_once",),
    ),
    PlantedBug(
        "drafts are compiled although one row loses by them",
        "er_jax::Controller._choose",
        "self._do_drafts_lose()",
        "not options",
        (
            "tests/test_control.py::"
            "test_where_one_row_gains_nothing_no_draft_is_compiled",
        ),
    ),
    PlantedBug(
        "a row measured past the policy's positions",
        "er_jax::measure_round",
        "limit = min(program.cache_length, most)",
        "limit = max(program.cache_length, most)",
        (
            "tests/test_unsound.py::"
            "test_measuring_a_round_feeds_no_position_that_the_policy_has_not",
        ),
    ),
    PlantedBug(
        "unseen values count where they are not finite",
        "er_jax::_attend_few.checked",
        "return lax.cond(jnp.all(is_clean), lambda *_: out, mended, probs, values)",
        "return lax.cond(jnp.all(is_clean), mended, lambda *_: out, probs, values)",
        (
            "tests/test_kv_cache.py::"
            "test_entries_that_are_not_visible_change_nothing[3-nan-False]",
        ),
    ),
    PlantedBug(
        "rows that have ended still write",
        "er_jax::_positions",
        "is_fed = state.live[:, None] & (positions < state.limit[:, None] - 1)",
        "is_fed = positions < state.limit[:, None] - 1",
        ("tests/test_lossless.py::test_dead_rows_are_not_written[coupled]",),
    ),
    PlantedBug(
        "bad logits reach the acceptance of the tokens before them",
        "er_jax::_below_best",
        "return jnp.where(jnp.isfinite(best), values - best, zero)",
        "return values - best",
        (
            "tests/test_lossless.py::"
            "test_bad_logits_leave_the_rest_of_the_distribution[block]",
        ),
    ),
    PlantedBug(
        "tokens of bad logits emitted",
        "er_jax::_emit",
        "num_emitted = jnp.where(state.live, jnp.minimum(wanted, num_finite), 0)",
        "num_emitted = jnp.where(state.live, wanted, 0)",
        ("tests/test_lossless.py::test_bad_logits_inside_a_draft[nan-good-coupled]",),
    ),
    PlantedBug(
        "logits rounded by the product, on NVIDIA GPUs",
        "er_jax::of_floats",
        "return lax.dot_general(x, w, dims, preferred_element_type=out_dtype)",
        """
        product = lax.dot_general(x, w, dims, preferred_element_type=x.dtype)
        return product.astype(out_dtype)
        """,
        (f"{LOWERING}::test_products_on_nvidia_round_to_what_is_asked",),
    ),
    # -- the cache
    PlantedBug(
        "attention mask off by one",
        "er_jax::visible",
        "return slots <= at",
        "return slots < at",
        ("tests/test_kv_cache.py::test_attention_by_either_path_equals_the_oracle",),
    ),
    PlantedBug(
        "entries that two blocks of a long cache share count twice",
        "er_jax::_attend_entries.add",
        "(slots <= of_query) & (slots >= index * block)",
        "slots <= of_query",
        (f"{LONG_CACHE}[5-2]",),
    ),
    PlantedBug(
        "a long cache is left a block early where the last entry is the first of one",
        "er_jax::_attend_entries.step",
        "index * block <= last",
        "index * block < last",
        (f"{LONG_CACHE}[5-2]",),
    ),
    PlantedBug(
        "a running sum of weights is not rescaled",
        "er_jax::_attend_entries.add.add_part",
        "total * kept",
        "total",
        (f"{LONG_CACHE}[5-2]",),
    ),
    PlantedBug(
        "the highest score so far is forgotten",
        "er_jax::_attend_entries.add.add_part",
        "lax.stop_gradient(jnp.maximum(old_top, top))",
        "lax.stop_gradient(top)",
        (f"{LONG_CACHE}[5-2]",),
    ),
    PlantedBug(
        "a key of -inf in a long cache weighs nothing",
        "er_jax::_attend_entries.add.add_part",
        "jnp.where(scores == -jnp.inf, nan, scores)",
        "scores",
        ("tests/test_kv_cache.py::test_a_key_of_minus_infinity_hides_nowhere",),
    ),
    PlantedBug(
        "a kernel stops a block early where the last entry is the first of a block",
        "er_jax/kernels/tpu::attend",
        "jnp.maximum(jnp.max(positions, axis=1), 0) // block",
        "(jnp.maximum(jnp.max(positions, axis=1), 1) - 1) // block",
        (f"{KERNELS}::test_the_kernel_equals_the_oracle[1-4-2-128]",),
    ),
    PlantedBug(
        "a kernel's running sum of weights is not rescaled",
        "er_jax/kernels::_attend_block",
        "rescale * total[part]",
        "total[part]",
        (f"{KERNELS}::test_the_kernel_equals_the_oracle[5-7-1-128]",),
    ),
    PlantedBug(
        "a kernel takes what lies behind the cache for entries",
        "er_jax/kernels::_attend_block",
        "place < length",
        "place <= length",
        (f"{KERNELS}::test_the_kernel_equals_the_oracle[5-7-1-128]",),
    ),
    PlantedBug(
        "an entry with a score of -inf weighs nothing",
        "er_jax/kernels::_attend_block",
        "jnp.where(is_sound, scores, jnp.float32(jnp.nan))",
        "scores",
        (f"{KERNELS}::test_what_is_not_finite_makes_no_wrong_number",),
    ),
    PlantedBug(
        "cuDNN's queries for non-finite keys look for +inf only",
        "er_jax/kernels/cuda::attend",
        "jnp.concatenate([q, mean, -mean], axis=1)",
        "jnp.concatenate([q, mean, mean], axis=1)",
        (f"{KERNELS}::test_the_kernel_for_gpus_asks_for_attention[5]",),
    ),
    PlantedBug(
        "padding has a result where a kernel attends",
        "er_jax/kernels::_attend",
        "jnp.where((positions >= 0)[..., None], out, jnp.zeros((), out.dtype))",
        "out",
        (f"{KERNELS}::test_the_kernel_for_gpus_asks_for_attention[5]",),
    ),
    PlantedBug(
        "a kernel is used however far it is from XLA's form",
        "er_jax::_difference",
        "difference.max() > TOLERANCE",
        "difference.max() > np.inf",
        (f"{KERNELS}::test_a_kernel_that_is_wrong_is_not_used",),
    ),
    PlantedBug(
        "blocks of queries put together in another order",
        "er_jax::_in_blocks",
        "out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads * size)",
        "out = out.reshape(batch, -1, heads * size)",
        ("tests/test_kv_cache.py::test_many_queries_are_taken_in_blocks",),
    ),
    PlantedBug(
        "a piece of a prompt fed at the positions of the first",
        "er_jax::admit",
        "offsets = start + jnp.arange(piece, dtype=jnp.int32)[None]",
        "offsets = jnp.arange(piece, dtype=jnp.int32)[None]",
        ("tests/test_steps.py::test_a_prompt_may_be_prefilled_in_pieces[3]",),
    ),
    PlantedBug(
        "the last piece of a prompt left out",
        "er_jax::admit",
        "num_pieces = -(-num_tokens // piece)",
        "num_pieces = num_tokens // piece",
        ("tests/test_steps.py::test_a_prompt_may_be_prefilled_in_pieces[3]",),
    ),
    PlantedBug(
        "padding written to the last entry",
        "er_jax::write",
        "index = jnp.where(positions < 0, size, positions)",
        "index = positions",
        ("tests/test_kv_cache.py::test_write_puts_entries_at_their_positions",),
    ),
    # -- the switch
    PlantedBug(
        "expected tokens of a round without the last one",
        "er_jax::AcceptanceEstimate.tokens_per_round",
        "return expected_tokens(list(self.keep_probs(gamma)))",
        "return expected_tokens(list(self.keep_probs(gamma))) - 1",
        ("tests/test_control.py::test_speed_is_expected_tokens_over_seconds",),
    ),
    PlantedBug(
        "drafts behind a rejection counted as tested",
        "er_jax::AcceptanceEstimate.observe",
        "self.tested[:depth] += at_least[:depth]",
        "self.tested[:depth] += at_least[0]",
        ("tests/test_control.py::test_acceptance_by_hand",),
    ),
    PlantedBug(
        "predictions trusted more the more was measured",
        "er_jax::LatencyTable._round_seconds",
        "believed = measured + uncertainty * (predicted - measured)",
        "believed = predicted + uncertainty * (measured - predicted)",
        (
            "tests/test_costs.py::test_few_rounds_count_for_little_beside_what_others_say",
        ),
    ),
    PlantedBug(
        "predictions remembered for good",
        "er_jax::LatencyTable._observe",
        "abs(now - before) > STALE * before",
        "before < 0",
        ("tests/test_costs.py::test_predictions_follow_what_is_observed",),
    ),
    PlantedBug(
        "a stall weighs by its length",
        "er_jax::LatencyTable._observe",
        "math.exp(-num_rounds * known * self.slowdown / MEMORY_S)",
        "math.exp(-seconds / MEMORY_S)",
        ("tests/test_costs.py::test_a_stall_counts_at_most_twice_what_was_known",),
    ),
    PlantedBug(
        "a slowed machine taken for a slowed program",
        "er_jax::LatencyTable._observe",
        "is_trusted and self._is_changing",
        "False",
        ("tests/test_costs.py::test_a_machine_that_changes_changes_all_programs[2.0]",),
    ),
    PlantedBug(
        "costs of another version taken for this one's",
        "er_jax::load_costs",
        'LatencyTable.load(path, about), path.read_text("utf-8")',
        'LatencyTable.load(path), path.read_text("utf-8")',
        (
            "tests/test_calibrate.py::"
            "test_costs_of_something_else_are_refused_and_replaced[jax]",
        ),
    ),
    PlantedBug(
        "a broken draft runs for a whole window",
        "er_jax::Batch.start_window",
        "max_rounds = min(max_rounds, enough, MIN_ROUNDS)",
        "max_rounds = max(max_rounds, enough, MIN_ROUNDS)",
        (
            "tests/test_scheduler.py::test_the_first_window_that_drafts_is_a_short_trial",
        ),
    ),
    PlantedBug(
        "rows that ended fetched from the wrong slots",
        "er_jax::Engine.fetch_rows",
        "{int(row): (tokens[row], logprobs[row]) for row in rows}",
        "{int(row): (tokens[row - 1], logprobs[row]) for row in rows}",
        ("tests/test_engine.py::test_rows_are_fetched_by_their_number",),
    ),
    PlantedBug(
        "the published ladder climbs without persistence",
        "er_jax::PaperRule.end_rollout",
        "self._num_high + 1 if rate >= PAPER_RAISE else 0",
        "self._num_high + 1 if rate >= PAPER_RAISE else self._num_high",
        ("tests/test_trace_replay.py::test_the_ladder",),
    ),
    PlantedBug(
        "the published switch turns back",
        "er_jax::PaperRule.choose",
        "not self.is_on and self._has_ramped",
        "self._has_ramped",
        (
            "tests/test_trace_replay.py::"
            "test_the_switch_waits_for_a_full_batch_and_stays_on",
        ),
    ),
    PlantedBug(
        "probing without a bound",
        "er_jax::Controller._choose",
        "earned_s = PROBE_SHARE * self._plain_s - self._probed_s",
        "earned_s = self._plain_s - self._probed_s",
        ("tests/test_control.py::test_probing_is_bounded",),
    ),
    PlantedBug(
        "every window contradicts",
        "er_jax::AcceptanceEstimate.contradiction",
        "float(tested @ (chance * (1 - chance))) + (DRIFT * total) ** 2",
        "float(tested @ (chance * (1 - chance)))",
        ("tests/test_control.py::test_few_rounds_contradict_nothing",),
    ),
    PlantedBug(
        "a verification computed as one position",
        "er_jax::Roofline.pass_seconds",
        "computed = positions * rows * (self.dense_s + self.attention_s * length)",
        "computed = rows * (self.dense_s + self.attention_s * length)",
        ("tests/test_pass_costs.py::test_the_roofline_equations",),
    ),
    PlantedBug(
        "lines of a surface that cross outside of it",
        "er_jax::Surface.seconds",
        "np.maximum.accumulate(np.maximum(low + share * (high - low), least))",
        "np.maximum(low + share * (high - low), least)",
        ("tests/test_pass_costs.py::test_no_surface_falls_in_rows_or_length",),
    ),
    PlantedBug(
        "a surface that costs nothing where nothing was measured",
        "er_jax::Surface.fit",
        "ascending[3 * num_rows - 2 + i, [i, num_rows + i]] = -1, least",
        "ascending[3 * num_rows - 2 + i, [i, num_rows + i]] = -1, 0",
        ("tests/test_pass_costs.py::test_no_pass_is_for_nothing",),
    ),
    PlantedBug(
        "a pass over no positions in a replay",
        "er_jax::replay",
        "-(-max(length, 1) // LENGTH_STEP)",
        "-(-length // LENGTH_STEP)",
        ("tests/test_trace_replay.py::test_no_row_decodes_without_a_token",),
    ),
    PlantedBug(
        "means of a sweep read for medians",
        "er_jax::_reading",
        'float(row["median_ms"])',
        'float(row["mean_ms"])',
        ("tests/test_sweep.py::test_medians_are_read_in_seconds",),
    ),
    PlantedBug(
        "rejected drafts taken for kept ones",
        "er_jax::KeptDrafts.__init__",
        "np.where(is_kept, total, np.arange(total))",
        "np.where(is_kept, np.arange(total), total)",
        ("tests/test_trace_replay.py::test_kept_drafts_are_a_matter_of_the_token",),
    ),
    # -- checkpoints and other frameworks
    PlantedBug(
        "rotary scaling of the short waves instead of the long ones",
        "er_jax::RopeScaling.scaled",
        "(1 - kept) * frequency / number(self.factor) + kept * frequency",
        "kept * frequency / number(self.factor) + (1 - kept) * frequency",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[llama 3.1]",),
    ),
    PlantedBug(
        "a square projection read as it lies",
        "er_jax::_fill",
        "view = out.T if tensor.is_transposed else out",
        """
        is_square = out.shape[0] == out.shape[1]
        view = out.T if tensor.is_transposed and not is_square else out
        """,
        ("tests/test_hf.py::test_logits_are_those_of_transformers[llama 2]",),
    ),
    PlantedBug(
        "the norm's weight of queries given to keys",
        "er_jax::Decoder._attention",
        'self._norm(k, layer["k_norm"])',
        'self._norm(k, layer["q_norm"])',
        ("tests/test_hf.py::test_logits_are_those_of_transformers[qwen3]",),
    ),
    # -- windows of layers, Gemma 3, experts
    PlantedBug(
        "a window one position wider",
        "er_jax::Decoder.init_cache",
        "Span(0, window)",
        "Span(0, window + 1)",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[mistral, window]",),
    ),
    PlantedBug(
        "the rotation of local layers in global ones",
        "er_jax::Decoder.forward",
        "whole if c.window_of(index) is None else local",
        "local",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[gemma 3]",),
    ),
    PlantedBug(
        "local and global layers counted from one",
        "er_jax::_gemma3",
        "tuple(i for i in range(count) if types[i] == GLOBAL)",
        "tuple(i for i in range(count) if types[i - 1] == GLOBAL)",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[gemma 3]",),
    ),
    PlantedBug(
        "norms of Gemma that multiply by w instead of 1 + w",
        "er_jax::Decoder._norm",
        "1 + weight.astype(wide)",
        "weight.astype(wide)",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[gemma 3]",),
    ),
    PlantedBug(
        "queries scaled by the size of a head",
        "er_jax::Decoder._attention",
        "c.query_scalar not in (None, c.head_size)",
        "False",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[gemma 3]",),
    ),
    PlantedBug(
        "a router's weights not scaled to add up to one",
        "er_jax::routed",
        "top = top / jnp.sum(top, axis=-1, keepdims=True)",
        "top = top",
        ("tests/test_hf.py::test_logits_are_those_of_transformers[qwen3, experts]",),
    ),
    PlantedBug(
        "the products of one expert with the shares of another",
        "er_jax::_looped",
        "_expert(weights, order[i])",
        "_expert(weights, order[i - 1])",
        ("tests/test_experts.py::test_the_loop_is_the_sum_over_the_chosen",),
    ),
    PlantedBug(
        "sorted tokens given the shares of others",
        "er_jax::_ragged",
        "share.reshape(-1)[order]",
        "share.reshape(-1)",
        ("tests/test_experts.py::test_tokens_sorted_by_expert_give_the_same",),
    ),
    PlantedBug(
        "experts of padding read all the same",
        "er_jax::feed_forward",
        "jnp.where(is_real[..., None], shares, jnp.zeros((), shares.dtype))",
        "shares",
        ("tests/test_experts.py::test_padding_chooses_no_expert",),
    ),
    PlantedBug(
        "a draft's ring begun one entry late in a ring",
        "er_jax::_held",
        "jnp.roll(entries(jnp.int32(0), length), -(last + 1), axis=0)",
        "jnp.roll(entries(jnp.int32(0), length), -last, axis=0)",
        ("tests/test_windows.py::test_rings_of_drafts_are_made_of_rings",),
    ),
    PlantedBug(
        "a prompt's last entries a slot off in their ring",
        "er_jax::insert_row",
        "_held(short.entries, source, count - 1, leaf.span, size)",
        "_held(short.entries, source, count, leaf.span, size)",
        ("tests/test_windows.py::test_rings_of_a_state_are_those_of_the_prompt",),
    ),
    PlantedBug(
        "a prompt cloned from a row that has gone past its ring",
        "er_jax::forget_replaced",
        "rows.length + RING_DRAFTS > request.ring_slots",
        "rows.length + RING_DRAFTS < 0",
        ("tests/test_windows.py::test_a_row_past_its_ring_holds_no_prompt",),
    ),
    PlantedBug(
        "a row copied onto itself loses what is behind its ring",
        "er_jax::admit",
        "jnp.where(count < state.cache_length, count, NONE)",
        "count",
        ("tests/test_windows.py::test_a_row_copied_onto_itself_stays",),
    ),
    PlantedBug(
        "a digit of a threshold one too high",
        "er_jax::_threshold",
        "range(1, 1 << digit_bits)",
        "range(0, 1 << digit_bits)",
        ("tests/test_sampling.py::test_truncation_keeps_ties",),
    ),
    PlantedBug(
        "a quantized layer without its bias",
        "er_jax::_quantized_layers",
        "module.use_bias",
        "False",
        (f"{INTEGRATIONS}[linen]",),
    ),
    PlantedBug(
        "a collective of the draft counted once",
        "er_jax::collectives",
        'times = gamma if "/draft/" in match["rest"] else 1',
        "times = 1",
        ("tests/test_plan.py::test_collectives_are_counted_by_round",),
    ),
    # -- meshes
    PlantedBug(
        "a row that changes its data shard is given to the one it leaves",
        "er_jax::exchange",
        "is_to = moves.to_shard[i] == here",
        "is_to = moves.from_shard[i] == here",
        ("tests/test_mesh.py::test_rows_move_between_data_shards[moved]",),
    ),
    PlantedBug(
        "every device attends with the first key/value heads",
        "er_jax::_attend_some",
        "first = lax.axis_index(MODEL_AXIS) * heads",
        "first = 0 * lax.axis_index(MODEL_AXIS) * heads",
        ("tests/test_mesh.py::test_attention_over_sharded_heads[8-4-8-1]",),
    ),
    PlantedBug(
        "slots of a later data shard counted from the first",
        "er_jax::plan_admission",
        "slot[i], prompt_index[i] = start.row - shard_rows.start, start.prompt",
        "slot[i], prompt_index[i] = start.row, start.prompt",
        ("tests/test_mesh.py::test_short_completions_are_those_of_one_device",),
    ),
    PlantedBug(
        "parts of parts of the weights in the wrong order",
        "er_jax::as_sharded",
        "(MODEL_AXIS, DATA_AXIS)",
        "(DATA_AXIS, MODEL_AXIS)",
        (
            "tests/test_mesh.py::test_data_shards_become_one_without_sending_weights[4x2]",
            "tests/test_sharding.py::test_shared_parts_are_parts_of_what_a_device_holds",
        ),
    ),
    PlantedBug(
        "rounds of shared rows are taken for those of data shards",
        "er_jax::LatencyTable._prediction",
        "others = [p for p in self.seconds if p.shared_rows]",
        "others = list(self.seconds)",
        ("tests/test_costs.py::test_shared_programs_are_priced_beside_the_same_apart",),
    ),
    PlantedBug(
        "a verification is guessed to feed as many positions as drafts",
        "er_jax/control/guesses::guessed_seconds",
        "part.rows * (part.gamma + 1)",
        "part.rows * part.gamma",
        ("tests/test_control.py::test_a_round_is_guessed_from_steps",),
    ),
    PlantedBug(
        "a step is taken for slower than the drafts beside it leave room for",
        "er_jax::LatencyTable._prediction",
        "(1 + other.gamma) ** ROWS_EXPONENT + DRAFT_SHARE * other.gamma",
        "1 + DRAFT_SHARE * other.gamma",
        (
            "tests/test_benchmarks.py"
            "::test_plain_decoding_is_tried_where_only_drafts_ran[1.5]",
        ),
    ),
    PlantedBug(
        "the shortest prompts are dealt first",
        "er_jax/replicas::deal",
        'np.argsort(-np.asarray(costs, float), kind="stable")',
        'np.argsort(np.asarray(costs, float), kind="stable")',
        ("tests/test_replicas.py::test_the_longest_are_dealt_first",),
    ),
    PlantedBug(
        "a save that can be loaded before it is whole",
        "er_jax::_order",
        "return 0 if WEIGHT_FILE.fullmatch(name) else 1 + (name == CONFIG)",
        "return 2 if WEIGHT_FILE.fullmatch(name) else 1 - (name == CONFIG)",
        ("tests/test_hf_saving.py::test_killed_before_every_step[empty]",),
    ),
    PlantedBug(
        "weights of an index where transformers reads one file",
        "er_jax::_files",
        "is_file(path / WEIGHTS)",
        "is_file(path / WEIGHTS) and not is_file(path / INDEX)",
        ("tests/test_hf_damage.py::test_one_file_is_read_before_an_index",),
    ),
    PlantedBug(
        "true read as the number 1",
        "er_jax::whole_field",
        "type(value) is int and low <= value <= high",
        "isinstance(value, int) and low <= value <= high",
        ("tests/test_hf_damage.py::test_every_field_is_checked[llama-vocab_size]",),
    ),
    PlantedBug(
        "a digest that does not see where a number stands",
        "er_jax::_hashed",
        "first = mixed(words ^ mixed(index))",
        "first = mixed(words)",
        (f"{DAMAGE}::test_digests_see_places_and_nothing_of_the_layout",),
    ),
    PlantedBug(
        "arrays of a checkpoint taken as they come",
        "train::Checkpoints._arrays",
        "tree_digest(found) != wanted",
        "wanted is None",
        (f"{DAMAGE}::test_a_flipped_byte_of_an_array_is_never_given_back[trainer]",),
    ),
    PlantedBug(
        "problems in one order in every round",
        "train::problem_at",
        "_order(len(problems), seed, epoch)",
        "_order(len(problems), seed, 0)",
        (
            "tests/test_tasks.py"
            "::test_the_stream_takes_every_problem_once_each_time_round",
        ),
    ),
    PlantedBug(
        "replicas of one step forget as if they were steps",
        "er_jax::Rollouts.start",
        "all(other.setting != setting for other in self.running)",
        "True",
        ("tests/test_threads.py::test_rollouts_at_once_forget_once",),
    ),
    PlantedBug(
        "a thread learns at the setting of another",
        "er_jax::Rollouts.current",
        "return self._own.rollout or self._latest",
        "return self._latest",
        (
            "tests/test_threads.py::test_a_rollout_in_another_thread_has_its_own_setting",
        ),
    ),
    PlantedBug(
        "costs of one cache taken for another's",
        "er_jax::conditions",
        "_digest(signature(_position(engine.policy)))",
        '""',
        ("tests/test_calibrate.py::test_caches_of_another_kind_are_told_apart",),
    ),
    # -- the draft's products
    PlantedBug(
        "a group multiplied with the scales of another",
        "er_jax::_add_groups",
        "scale[:, group]",
        "scale[:, 0]",
        (
            "tests/test_drafter.py::test_dot_of_a_quantized_weight[w8g8aauto-auto-shape1]",
        ),
    ),
    PlantedBug(
        "products for NVIDIA left to XLA to merge",
        "er_jax::_alone",
        "lax.optimization_barrier((x, codes))",
        "(x, codes)",
        ("tests/test_drafter.py::test_products_for_nvidia_are_kept_apart[4]",),
    ),
    PlantedBug(
        "scaled weights in memory where an option is refused",
        "er_jax::Lowering.compile",
        "self.lower(scales_inside=False)",
        "self.lower(scales_inside=True)",
        ("tests/test_lowering.py::test_what_fails_with_options_is_compiled_without",),
    ),
    PlantedBug(
        "sums split among blocks of a GPU, and scales inside all the same",
        "er_jax::Lowering.compile",
        "WHOLE_SUMS | (SCALES_INSIDE if in_groups else {})",
        "SCALES_INSIDE if in_groups else WHOLE_SUMS",
        (
            "tests/test_lowering.py::"
            "test_only_nvidia_has_options_and_only_groups_are_scaled_inside[8]",
        ),
    ),
    PlantedBug(
        "a vocabulary projection in the bits of the rest",
        "er_jax::_quantized_leaves",
        "projection_bits if PROJECTION in name else config.bits",
        "config.bits",
        (
            "tests/test_drafter.py::"
            "test_the_vocabulary_projection_has_bits_of_its_own[None]",
        ),
    ),
    # -- low-rank pairs
    PlantedBug(
        "LoRA: a change without its scale",
        "er_jax::dot",
        "w.scale * change",
        "change",
        (f"{LORA}::test_a_product_is_that_of_the_sum[shape1-float64-1e-12]",),
    ),
    PlantedBug(
        "LoRA: a change without its scale in the draft alone",
        "er_jax::draft_params",
        "policy.replace(base=draft.base)",
        "policy.replace(base=draft.base, scale=1.0)",
        (f"{LORA}::test_a_draft_is_the_quantized_bases_with_the_live_pairs[config0]",),
    ),
    PlantedBug(
        "LoRA: gradients reach the frozen base",
        "er_jax::dot",
        "lax.stop_gradient(w.base)",
        "w.base",
        (f"{LORA}::test_the_gradient_is_the_pairs_alone",),
    ),
    PlantedBug(
        "LoRA: no gradient of the pair",
        "er_jax::dot",
        "dot(dot(x, w.a.astype(x.dtype)), w.b.astype(x.dtype), out_dtype=wide)",
        """
        dot(dot(x, lax.stop_gradient(w.a.astype(x.dtype))), w.b.astype(x.dtype),
            out_dtype=wide)
        """,
        (f"{LORA}::test_the_gradient_is_the_pairs_alone",),
    ),
    PlantedBug(
        "LoRA: a draft with the pairs that it was made with",
        "er_jax::_quantized_leaves",
        "value.replace(base=base, a=None, b=None)",
        "value.replace(base=base)",
        (f"{LORA}::test_a_draft_is_the_quantized_bases_with_the_live_pairs[config0]",),
    ),
    PlantedBug(
        "codes kept of a weight that has changed",
        "er_jax::_quantized_leaves",
        "_array(value) is _array(_base(before))",
        "True",
        (f"{LORA}::test_codes_of_the_same_arrays_are_kept",),
    ),
    PlantedBug(
        "LoRA: new pairs that change the policy",
        "er_jax::add_lora",
        "jnp.zeros((rank, num_out), kind)",
        "jnp.ones((rank, num_out), kind)",
        (f"{LORA}::test_targets_decide_which_weights_have_pairs",),
    ),
    PlantedBug(
        "LoRA: all pairs begin alike",
        "er_jax::add_lora",
        "jax.random.uniform(own, (num_in, rank), kind, -bound, bound)",
        "jax.random.uniform(key, (num_in, rank), kind, -bound, bound)",
        (f"{LORA}::test_targets_decide_which_weights_have_pairs",),
    ),
    PlantedBug(
        "LoRA: merged without the scale",
        "er_jax::merge_lora",
        "leaf.scale * change",
        "change",
        (f"{LORA}::test_merged_and_without",),
    ),
    PlantedBug(
        "LoRA: the sides of a pair sharded as each other",
        "er_jax::LORA_PARTS",
        '{"base": (0, 1), "a": (0, None), "b": (None, 1)}',
        '{"base": (0, 1), "a": (1, None), "b": (None, 0)}',
        (f"{LORA}::test_pairs_lie_as_the_dimensions_of_their_bases",),
    ),
    PlantedBug(
        "LoRA: the scale of a stabilised adapter is that of any other",
        "er_jax::load_peft_adapter",
        'math.sqrt(rank) if fields["use_rslora"] else rank',
        "rank",
        (f"{PEFT}::test_an_adapter_is_the_change_that_it_says",),
    ),
    PlantedBug(
        "LoRA: an adapter saved with the rank for alpha",
        "er_jax::save_peft_adapter",
        "alpha = scale * rank",
        "alpha = rank",
        (f"{PEFT}::test_what_is_saved_is_loaded_again",),
    ),
    PlantedBug(
        "LoRA: an adapter of one layer saved as of all",
        "er_jax::_targets",
        "short if named == weights.keys() else sorted(weights)",
        "short",
        (f"{PEFT}::test_what_is_saved_is_loaded_again",),
    ),
    PlantedBug(
        "LoRA: the reference moves with the policy",
        "train::reference_of",
        "er_jax.without_lora(params) if has_lora(params) else kept",
        "params if has_lora(params) else kept",
        (f"{TRAIN_LORA}::test_an_update_steps_the_pairs_and_moves_nothing_else",),
    ),
    PlantedBug(
        "LoRA: a mesh samples from the pairs of the step before",
        "train::Placement.drafted",
        "new is old",
        "new is not None",
        (f"{TRAIN_LORA}::test_pairs_are_gathered_for_rollouts_and_bases_are_kept",),
    ),
    PlantedBug(
        "LoRA: every step quantizes all bases again",
        "train::Placement.drafted",
        "er_jax.attach_draft(params, config, previous=previous)",
        "er_jax.attach_draft(params, config)",
        (f"{TRAIN_LORA}::test_an_update_reuses_every_buffer_and_quantizes_nothing",),
    ),
    # -- sessions
    PlantedBug(
        "session: entries of the parameters before an update",
        "er_jax::Owner.has",
        "known is not None and known() is leaf",
        "known is not None",
        (f"{SESSION}::test_known_prompts_are_not_prefilled_again[32]",),
    ),
    PlantedBug(
        "session: NumPy arrays taken for what they were",
        "er_jax::Owner.__init__",
        "weakref.ref(leaf) if isinstance(leaf, jax.Array) else None",
        "weakref.ref(leaf)",
        (f"{SESSION}::test_known_prompts_are_not_prefilled_again[32]",),
    ),
    PlantedBug(
        "session: entries of another prompt of the same length",
        "er_jax::num_alike",
        "int(np.argmax(differs)) if differs.any() else length",
        "length",
        (f"{SESSION}::test_known_prompts_are_not_prefilled_again[32]",),
    ),
    PlantedBug(
        "session: what was used last is dropped first",
        "er_jax::PromptCache._shrink_to",
        "next(iter(self._kept))",
        "next(reversed(self._kept))",
        (f"{SESSION}::test_prompts_used_longest_ago_are_dropped_first",),
    ),
    PlantedBug(
        "session: use is not noted",
        "er_jax::PromptCache.find",
        "self._kept.move_to_end((owner, best))",
        "",
        (f"{SESSION}::test_prompts_used_longest_ago_are_dropped_first",),
    ),
    PlantedBug(
        "session: all entries of a prompt that only begins alike",
        "er_jax::run_copy_in",
        "kv_cache.copy_row(kv_cache.resize(entries, length), zero, zero, count)",
        "kv_cache.resize(entries, length)",
        (f"{SESSION}::test_copies_are_bit_for_bit_and_of_one_row",),
    ),
    PlantedBug(
        "session: the rest of a prompt one position late",
        "er_jax::extend",
        "jnp.where(start + offsets < count, start + offsets, NONE)",
        "jnp.where(start + offsets < count, start + offsets + 1, NONE)",
        (f"{SESSION}::test_of_a_prompt_that_begins_alike_the_rest_is_prefilled[32]",),
    ),
    PlantedBug(
        "session: closed, and its prompts stay",
        "er_jax::Session.close",
        "self.prompts.close()",
        "",
        (f"{SESSION}::test_a_closed_session_has_freed_everything",),
    ),
    # -- partial rollouts
    PlantedBug(
        "partial: log-probabilities computed anew, not as recorded",
        "train::Trainer.learn",
        "data.out",
        """dataclasses.replace(data.out, logprobs=np.array(er_jax.score(
            self.policy, self.state.params, data.out,
            config=self.config.rollout_config(group_size=2)).logprobs))""",
        (PARTIAL_STEPS,),
    ),
    PlantedBug(
        "partial: a group that was learnt from is carried",
        "train::divided",
        "np.setdiff1d(np.arange(grpo.prompts_in_work), learnt)",
        "np.arange(grpo.prompts_per_step, grpo.prompts_in_work)",
        (f"{PARTIAL}::test_the_oldest_complete_groups_are_learnt_from",),
    ),
    PlantedBug(
        "partial: every token is of the first step",
        "train::Trainer._partial_step",
        "int(self.state.step), int(self.state.position)",
        "0, int(self.state.position)",
        (PARTIAL_STEPS,),
    ),
    PlantedBug(
        "partial: a resumed request forgets what was sampled",
        "er_jax::Rollout.for_request",
        "array[np.array(rows)[is_here]]",
        "otherwise",
        (f"{PARTIAL}::test_a_request_gets_what_is_there_of_it",),
    ),
    PlantedBug(
        "partial: a group is waited for one step late",
        "train::Ending.__init__",
        "age >= grpo.partial.max_age",
        "age > grpo.partial.max_age",
        (f"{PARTIAL}::test_a_group_that_comes_of_age_is_waited_for",),
    ),
    PlantedBug(
        "partial: the gap to the rollout counts what was learnt since",
        "train::policy_loss",
        "jnp.max(jnp.abs(gap) * fresh)",
        "jnp.max(jnp.abs(gap))",
        (PARTIAL_STEPS,),
    ),
    PlantedBug(
        "partial: a checkpoint forgets what is carried",
        "train::Checkpoints._carried",
        '"carried" not in host',
        "True",
        (f"{PARTIAL}::test_a_damaged_carry_is_named",),
    ),
    # -- Tunix
    PlantedBug(
        "Tunix: heads of the attention output merged as those of its input",
        "er_jax::LAYER",
        'Leaf("o_proj", "attn/o_proj/w", HEADS_IN)',
        'Leaf("o_proj", "attn/o_proj/w", HEADS_OUT)',
        (f"{TUNIX}::test_every_array_has_its_place[Llama3]",),
    ),
    PlantedBug(
        "Tunix: LoRA merged without its scale",
        "er_jax::Weights._merged_lora",
        "scale * change.transpose(*np.argsort(order))",
        "change.transpose(*np.argsort(order))",
        (f"{TUNIX}::test_lora_parameters_are_merged_or_refused_by_name",),
    ),
    PlantedBug(
        "Tunix: weights with LoRA parameters kept as they are",
        "er_jax::Weights.kept",
        "same and not self._has_lora(of.theirs)",
        "same",
        (f"{TUNIX}::test_lora_parameters_are_merged_or_refused_by_name",),
    ),
    PlantedBug(
        "Tunix: every completion of a prompt has the same noise",
        "er_jax::Noise.ask",
        "start + self._asked[digest]",
        "start",
        (f"{TUNIX}::test_noise_follows_from_what_is_asked",),
    ),
    PlantedBug(
        "Tunix: every step has the same noise",
        "er_jax::Noise.advance",
        "self._version += 1",
        "",
        (f"{TUNIX}::test_noise_follows_from_what_is_asked",),
    ),
    PlantedBug(
        "Tunix: the text of a completion without its last token at a limit",
        "er_jax::text_of",
        "tokens[:-1] if is_stopped else tokens",
        "tokens[:-1]",
        (f"{TUNIX}::test_a_call_gets_its_completions_cut_at_its_limit",),
    ),
    PlantedBug(
        "Tunix: scores with padding between the tokens",
        "er_jax::completion_logprobs",
        "jnp.argsort(~mask, axis=1, stable=True)",
        "jnp.argsort(jnp.zeros_like(mask), axis=1, stable=True)",
        (f"{TUNIX}::test_scores_are_those_of_the_text_without_padding",),
    ),
    PlantedBug(
        "Tunix: scores left where padding was moved from",
        "er_jax::completion_logprobs",
        "jnp.take_along_axis(found, jnp.argsort(first, axis=1), axis=1)",
        "found",
        (f"{TUNIX}::test_scores_are_those_of_the_text_without_padding",),
    ),
    PlantedBug(
        "Tunix: keys of Gemma 3 taken for its values",
        "er_jax::GEMMA3_APART",
        'Leaf("v_proj", "attn/kv_einsum/w", STACKED, 1)',
        'Leaf("v_proj", "attn/kv_einsum/w", STACKED, 0)',
        (f"{TUNIX}::test_every_array_of_gemma3_has_its_place[2]",),
    ),
    PlantedBug(
        "Tunix: heads in front merged with the input as they lie",
        "er_jax::Leaf.made_from",
        "array.transpose(*stack, *order)",
        "array",
        (f"{TUNIX}::test_every_array_of_gemma3_has_its_place[2]",),
    ),
    PlantedBug(
        "Tunix: the first layer of Gemma 3 is global",
        "er_jax::_gemma3_fields",
        "range(GEMMA3_PATTERN - 1, num_layers, GEMMA3_PATTERN)",
        "range(0, num_layers, GEMMA3_PATTERN)",
        (f"{TUNIX}::test_gemma3_is_set_as_its_configuration_says",),
    ),
    PlantedBug(
        "Tunix: LoRA of stacked weights with the input in front",
        "er_jax::Weights._merged_lora",
        "change.transpose(*np.argsort(order))",
        "change.reshape(x.shape)",
        (f"{TUNIX}::test_lora_parameters_of_stacked_weights_are_merged",),
    ),
    PlantedBug(
        "training: a tool's answer is learnt from",
        "train::batch_of",
        "1 if example.sampled is None else example.sampled",
        "1",
        (f"{TOOLS}::test_appended_tokens_are_not_learnt_from",),
    ),
    PlantedBug(
        "training: an appended token counts as sampled by the newest parameters",
        "train::batch_of",
        "batch.mask[row, first:used] * fresh",
        "fresh",
        (f"{TOOLS}::test_appended_tokens_are_not_learnt_from",),
    ),
    PlantedBug(
        "training: a tool is told of the last turn only",
        "train::_answer",
        "tokenizer.decode(turn.completion_ids)",
        "tokenizer.decode(turn.token_ids)",
        (f"{TOOLS}::test_turns_are_answered_where_the_tool_is_called",),
    ),
    PlantedBug(
        "Tunix: every draft is the first",
        "er_jax::Adoption.__call__",
        "tuple(others)",
        "(draft,) * len(others)",
        (f"{TUNIX}::test_adopted_weights_are_shared_and_nothing_passes_the_host",),
    ),
)


def main(words: list[str] | None = None) -> int:
    """Print the table; return 1 if a bug was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted_bugs")
    parser.add_argument("words", nargs="*", help="bugs with one of these in their name")
    parser.add_argument(
        "--without", action="store_true", help="run the named tests without any bug"
    )
    asked = parser.parse_args(words)
    bugs = [b for b in BUGS if not asked.words or any(w in b.name for w in asked.words)]
    if asked.without:
        tests = sorted({test for bug in bugs for test in bug.tests})
        ((_, clean),) = run_tests([(None, tests)])
        print(clean.output)
        return clean.status
    missed = 0
    for (bug, _), outcome in run_tests([(bug, bug.tests) for bug in bugs]):
        assert bug is not None
        caught = outcome.failed_assertion
        print(
            f"{bug.name:62} {outcome.seconds:4.0f} s {outcome.cpu_s:5.1f} s of a core  "
            f"{caught or 'NOT CAUGHT'}",
            flush=True,
        )
        if not caught:
            print(f"exit status {outcome.status}\n{outcome.output[-2000:]}")
            missed += 1
    print(f"{len(bugs)} bugs, {missed} not caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
