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


SCORES = "%scores = f32[8,6,64]{2,1,0} dot(%b3, %b0)"
QUERY, SCRATCH = B * 4 * 6 * 32 * 2, 4096


def attending(call: str) -> traffic.Count:
    """Count the verification of a window whose attention is a custom call."""
    query = "  %queries = bf16[8,4,6,32]{3,2,1,0} broadcast(%b0)\n"
    assert SCORES in WINDOW
    return traffic.count_window(
        WINDOW.replace("  " + SCORES, query + call), SIZES
    ).target


def test_a_kernel_reads_its_operands_once_and_writes_its_result() -> None:
    """Of a TPU: the cache is read at its padded length, and no scores are written."""
    found = attending(
        "  %out.1 = bf16[8,4,6,32]{3,2,1,0} custom-call(%where, %queries, %b3, %b3), "
        'custom_call_target="tpu_custom_call"'
    ).num_bytes
    plain = traffic.count_window(WINDOW, SIZES).target.num_bytes
    assert "scores" not in found
    assert found["cache"] == 2 * CACHE  # keys, and values that are the same here
    # Queries are written, and read; the result is written; and the call's numbers.
    assert found["other"] == plain["other"] - 4 + 3 * QUERY + 4 + B * 2 * 4


def test_attention_of_cudnn_also_writes_its_workspace() -> None:
    call = (
        "  %out.1 = (bf16[8,4,6,32]{{3,1,2,0}}, u8[4096]{{0}}) "
        "custom-call(%queries, %b3, %b3, %where), "
        'custom_call_target="{}"'
    )
    found = attending(call.format("__cudnn$fmhaSoftmax")).num_bytes
    other = attending(call.format("__cublas$gemm")).num_bytes
    assert found["other"] == other["other"] + SCRATCH
    assert found["cache"] == other["cache"] == 2 * CACHE
