"""The bytes of passes, counted in the text of compiled windows."""

from __future__ import annotations

from pathlib import Path

from er_jax.tools import traffic

V, S, B = 1000, 64, 8

# A window as a compiler would print it: several rounds between exit tests, each with a
# loop of drafts, a verification, a loop that mends, and a conditional.
WINDOW = (Path(__file__).parent / "window.hlo").read_text()

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
    # The projection reads all of the table, the look-up rows of it; a quarter is
    # copied to on-chip memory ahead of time.
    assert target.num_bytes["weights"] == TABLE + B * 16 * 4 + TABLE // 4
    # The cheap branch of the conditional copies nothing.
    assert target.num_bytes["logits"] == LOGITS
    assert "sampling" not in target.num_bytes
    assert target.branches == 2 + 1 + 1
