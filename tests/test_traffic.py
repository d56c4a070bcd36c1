"""The bytes of passes, counted in the text of compiled windows: by hand and for real."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from er_jax.tools import module, traffic

V, S, B = 1000, 64, 8

# A window as a compiler would print it: two rounds between exit tests, each with a loop
# of drafts, a verification and a loop that mends. Sizes are small and all different.
WINDOW = """
HloModule jit_run_window, is_scheduled=true

%write (c: bf16[8,64,32], i: s32[8,2], n: bf16[8,3,32]) -> bf16[8,64,32] {
  %c = bf16[8,64,32]{2,1,0} parameter(0)
  %i = s32[8,2]{1,0} parameter(1)
  %n = bf16[8,3,32]{2,1,0} parameter(2)
  ROOT %put = bf16[8,64,32]{2,1,0} scatter(%c, %i, %n), to_apply=%add
}

%some (t: f32[1000,16], i: s32[8]) -> f32[8,16] {
  %t = f32[1000,16]{1,0} parameter(0)
  %i = s32[8]{0} parameter(1)
  %turned = f32[1000,16]{1,0} bitcast(%t)
  ROOT %rows = f32[8,16]{1,0} gather(%turned, %i)
}

%keep (a: (s32[], bf16[8,64,32])) -> pred[] {
  %a = (s32[], bf16[8,64,32]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%drafts (a: (s32[], bf16[8,64,32], f32[1000,16])) -> (s32[], bf16[8,64,32], f32[1000,16]) {
  %a = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) parameter(0)
  %a0 = s32[] get-tuple-element(%a), index=0
  %a1 = bf16[8,64,32]{2,1,0} get-tuple-element(%a), index=1
  %a2 = f32[1000,16]{1,0} get-tuple-element(%a), index=2
  %hidden = f32[8,16]{1,0} dot(%a1, %a0), metadata={op_name="f/draft/while/body/dot_general"}
  %logits = f32[8,1000]{1,0} dot(%hidden, %a2), metadata={op_name="f/draft/while/body/dot_general"}
  ROOT %out = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) tuple(%a0, %a1, %a2)
}

%verify (a: (s32[], bf16[8,64,32], f32[1000,16])) -> (s32[], bf16[8,64,32], f32[1000,16]) {
  %a = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) parameter(0)
  %b0 = s32[] get-tuple-element(%a), index=0
  %b1 = bf16[8,64,32]{2,1,0} get-tuple-element(%a), index=1
  %b2 = f32[1000,16]{1,0} get-tuple-element(%a), index=2
  %new = bf16[8,3,32]{2,1,0} broadcast(%b0), metadata={op_name="f/verify/while/body/x"}
  %where = s32[8,2]{1,0} iota(), metadata={op_name="f/verify/while/body/x"}
  %b3 = bf16[8,64,32]{2,1,0} fusion(%b1, %where, %new), kind=kLoop, calls=%write
  %scores = f32[8,6,64]{2,1,0} dot(%b3, %b0), metadata={op_name="f/verify/while/body/dot"}
  ROOT %out = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) tuple(%b0, %b3, %b2)
}

%none (a: f32[8,1000]) -> f32[8,1000] {
  ROOT %same = f32[8,1000]{1,0} parameter(0)
}

%dear (a: f32[8,1000]) -> f32[8,1000] {
  %all = f32[8,1000]{1,0} parameter(0)
  ROOT %sorted = f32[8,1000]{1,0} sort(%all), dimensions={1}
}

%round (a: (s32[], bf16[8,64,32], f32[1000,16])) -> (s32[], bf16[8,64,32], f32[1000,16]) {
  %a = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) parameter(0)
  %r2 = f32[1000,16]{1,0} get-tuple-element(%a), index=2
  %w1 = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) while(%a), condition=%keep, body=%drafts, metadata={op_name="f/while/body/while/body/draft/while"}, backend_config={"known_trip_count":{"n":"3"}}
  %w2 = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) while(%w1), condition=%keep, body=%verify, metadata={op_name="f/while/body/while/body/verify/while"}
  %w3 = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) while(%w2), condition=%keep, body=%verify, metadata={op_name="f/while/body/while/body/emit/while"}
  %ids = s32[8]{0} iota(), metadata={op_name="f/while/body/while/body/x"}
  %found = f32[8,16]{1,0} fusion(%r2, %ids), kind=kLoop, calls=%some
  %early = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%found)
  %chip = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%early)
  %logits2 = f32[8,1000]{1,0} dot(%chip, %r2), metadata={op_name="f/while/body/while/body/verify/dot_general"}
  %is = pred[] constant(false)
  %cut = f32[8,1000]{1,0} conditional(%is, %logits2, %logits2), true_computation=%dear, false_computation=%none
  ROOT %out = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) tuple(%w3, %w2, %r2)
}

%two (a: (s32[], bf16[8,64,32], f32[1000,16])) -> (s32[], bf16[8,64,32], f32[1000,16]) {
  %a = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) while(%a), condition=%keep, body=%round, metadata={op_name="f/while/body/while"}, backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main (n: s32[], cache: bf16[8,64,32], table: f32[1000,16]) -> (s32[], bf16[8,64,32], f32[1000,16]) {
  %n = s32[] parameter(0), metadata={op_name="max_rounds"}
  %cache = bf16[8,64,32]{2,1,0} parameter(1), metadata={op_name="state.cache[0]"}
  %table = f32[1000,16]{1,0} parameter(2), metadata={op_name="params.policy[\\'head\\']"}
  %start = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) tuple(%n, %cache, %table)
  ROOT %loop = (s32[], bf16[8,64,32]{2,1,0}, f32[1000,16]{1,0}) while(%start), condition=%keep, body=%two, metadata={op_name="f/while"}
}
"""

CACHE, TABLE, ENTRY, LOGITS = B * S * 32 * 2, V * 16 * 4, B * 32 * 2, B * V * 4

SIZES = traffic.Sizes(
    vocab_sizes=(V,), cache_length=S, weights=(TABLE, TABLE), cache=(CACHE, CACHE),
    entry=ENTRY, logits=LOGITS, gamma=3,
)  # fmt: skip


def test_a_round_by_hand() -> None:
    found = traffic.count_window(WINDOW, SIZES)
    draft, target = found.draft, found.target
    assert draft.num_bytes == {
        "cache": CACHE, "weights": TABLE, "logits": LOGITS,
        "other": 4 + 2 * B * 16 * 4,  # a number, and hidden states out and in
    }  # fmt: skip
    assert draft.kernels == 2
    assert target.num_bytes["cache"] == CACHE  # read for the scores, not for the write
    assert target.num_bytes["cache write"] == 3 * ENTRY
    assert target.num_bytes["scores"] == B * 6 * S * 4
    # The projection reads all of the table; the look-up reads rows of it.
    assert target.num_bytes["weights"] == TABLE + B * 16 * 4
    # The cheap branch of the conditional copies nothing.
    assert target.num_bytes["logits"] == LOGITS
    assert "sampling" not in target.num_bytes
    assert target.branches == 2 + 1 + 1
    assert found.round_kernels == target.kernels + 3 * 2
