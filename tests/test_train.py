"""The trainer's parts: advantages, losses, batches, metrics, one update."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import er_jax
from configs import arithmetic, tiny
from er_jax.engine.digests import tree_digest
from er_jax.types import Program
from train import losses, metrics, report, sft
from train.batching import Buckets, Example, batch_of, make_batches, stack_chunks
from train.controllers import RuleController
from train.losses import PolicyLoss
from train.update import TrainState, derive, make_optimizer, update

pytestmark = pytest.mark.usefixtures("unoptimized_module")

ONE = np.float32(1)


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A policy whose parameters are its logits: `[previous token, next token]`."""

    vocab_size: int = 3

    def init_cache(self, rows, length):
        return jnp.zeros((rows, length))

    def forward(self, params, tokens, positions, cache):
        return jax.nn.one_hot(tokens, self.vocab_size, dtype=params.dtype), cache

    def logits(self, params, hidden):
        return hidden @ params


TABLE = np.array([[0.3, -0.2, 0.5], [1.0, 0.1, -0.4], [-0.3, 0.8, 0.2]])


def log_softmax(logits):
    """In float64, by hand."""
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


# ------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    plain = losses.group_advantages(rewards, scale=False)
    np.testing.assert_allclose(
        plain, [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]]
    )
    scaled = losses.group_advantages(rewards, scale=True)
    # Standard deviations 1/2 and sqrt(3)/4, each plus 1e-4.
    np.testing.assert_allclose(scaled[0], plain[0] / 0.5001, rtol=1e-6)
    np.testing.assert_allclose(
        scaled[1], plain[1] / (math.sqrt(3) / 4 + 1e-4), rtol=1e-6
    )
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("reward", [0.0, 1.0, 1.1])
def test_a_group_of_equals_teaches_nothing(reward):
    # 1.1 is not exact in binary: its mean may differ from it in the last bit.
    rewards = np.full((2, 7), reward)
    assert not losses.group_advantages(rewards, scale=True).any()


# ----------------------------------------------------------------------- losses

# Two rows: advantages of either sign, ratios inside, below and above the clip.
EXAMPLES = [
    Example([0, 1], [2, 1, 0], behavior_logprobs=[-1.6, -2.2, -0.9], advantage=0.7),
    Example([2], [1, 1, 2], behavior_logprobs=[-0.5, -0.9, -0.6], advantage=-1.3),
]
OPTIONS = PolicyLoss(clip_low=0.2, clip_high=0.3, kl_coef=0.0)


def sampled_at(temperature):
    """The settings of the rollout that the examples are from."""
    return er_jax.RolloutConfig(max_new_tokens=3, temperature=temperature)


def transitions():
    """(row, previous token, token, behavior log-probability) of completion tokens."""
    for row, example in enumerate(EXAMPLES):
        sequence = [*example.prompt, *example.completion]
        behavior = example.behavior_logprobs or []
        for i, old in enumerate(behavior):
            index = len(example.prompt) + i
            yield row, sequence[index - 1], sequence[index], old


def by_hand(temperature=1.0):
    """Loss, its gradient by the table, and the share of tokens clipped."""
    logprobs = log_softmax(TABLE / temperature)
    loss, grad, clipped = 0.0, np.zeros_like(TABLE), 0.0
    for row, previous, token, old in transitions():
        advantage, weight = EXAMPLES[row].advantage, 1 / 3
        ratio = math.exp(logprobs[previous, token] - old)
        bounded = min(max(ratio, 0.8), 1.3)
        loss -= weight * min(ratio * advantage, bounded * advantage)
        if bounded * advantage < ratio * advantage:
            clipped += weight
            continue
        # d ratio / d logits = ratio * (one-hot - probabilities) / temperature
        step = (np.eye(3)[token] - np.exp(logprobs[previous])) / temperature
        grad[previous] -= weight * advantage * ratio * step
    return loss, grad, clipped


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_loss_and_gradient_by_hand(x64, temperature):
    batch = batch_of(EXAMPLES, rows=3, length=6)  # one row and a few places of padding
    (loss, info), grad = jax.value_and_grad(losses.policy_loss, 1, has_aux=True)(
        Bigram(), jnp.asarray(TABLE), None, batch, sampled_at(temperature), OPTIONS
    )
    expected_loss, expected_grad, expected_clipped = by_hand(np.float32(temperature))
    assert 0 < expected_clipped < 2  # some tokens are clipped and some are not
    # behavior log-probabilities and advantages are kept in float32
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
    np.testing.assert_allclose(info["clipped"], expected_clipped, rtol=1e-6)


def test_logprob_gap_is_the_largest_difference(x64):
    batch = batch_of(EXAMPLES, rows=2, length=4)
    _, info = losses.policy_loss(
        Bigram(), jnp.asarray(TABLE), None, batch, sampled_at(1), OPTIONS
    )
    logprobs = log_softmax(TABLE)
    gaps = [abs(logprobs[x, y] - old) for _, x, y, old in transitions()]
    np.testing.assert_allclose(info["logprob_gap"], max(gaps), rtol=1e-6)
    np.testing.assert_allclose(info["gap_sum"], sum(gaps), rtol=1e-6)
    assert info["tokens"] == len(gaps) == info["disagreed"]  # all are far from 1


@pytest.mark.parametrize(("gap", "disagreed"), [(0.0019, 0), (0.0021, 3), (-0.0011, 3)])
def test_ratios_outside_of_the_band_are_counted(x64, gap, disagreed):
    logprobs = log_softmax(TABLE)
    behavior = [logprobs[x, y] - gap for row, x, y, _ in transitions() if row == 0]
    example = dataclasses.replace(EXAMPLES[0], behavior_logprobs=behavior)
    batch = batch_of([example], rows=2, length=4)
    _, info = losses.policy_loss(
        Bigram(), jnp.asarray(TABLE), None, batch, sampled_at(1), OPTIONS
    )
    assert info["disagreed"] == disagreed


def test_on_policy_the_gradient_is_that_of_reinforce(x64):
    logprobs = log_softmax(TABLE)
    examples = [
        dataclasses.replace(
            example,
            behavior_logprobs=[
                logprobs[x, y] for r, x, y, _ in transitions() if r == row
            ],
        )
        for row, example in enumerate(EXAMPLES)
    ]
    batch = batch_of(examples, rows=2, length=4)
    grad = jax.grad(lambda p: losses.policy_loss(
        Bigram(), p, None, batch, sampled_at(1), OPTIONS)[0]
    )(jnp.asarray(TABLE))  # fmt: skip

    def reinforce(params):
        logprobs = jax.nn.log_softmax(params)
        return -sum(
            EXAMPLES[row].advantage / 3 * logprobs[x, y]
            for row, x, y, _ in transitions()
        )

    np.testing.assert_allclose(grad, jax.grad(reinforce)(jnp.asarray(TABLE)), atol=1e-6)


def test_kl_by_hand(x64):
    reference = TABLE[::-1].copy()
    options = dataclasses.replace(OPTIONS, kl_coef=0.5)
    batch = batch_of(EXAMPLES, rows=2, length=4)
    args = (jnp.asarray(reference), batch, sampled_at(1))
    with_kl, info = losses.policy_loss(Bigram(), jnp.asarray(TABLE), *args, options)
    without, _ = losses.policy_loss(Bigram(), jnp.asarray(TABLE), *args, OPTIONS)
    ours, theirs = log_softmax(TABLE), log_softmax(reference)
    expected = 0.0
    for _, x, y, _ in transitions():
        behind = theirs[x, y] - ours[x, y]
        expected += (math.exp(behind) - behind - 1) / 3
    assert expected > 0.1
    np.testing.assert_allclose(info["kl"], expected, rtol=1e-12)
    np.testing.assert_allclose(with_kl - without, 0.5 * expected, rtol=1e-9)


def test_kl_of_the_reference_itself_is_nothing(x64):
    options = dataclasses.replace(OPTIONS, kl_coef=0.5)
    batch = batch_of(EXAMPLES, rows=2, length=4)
    table = jnp.asarray(TABLE)
    loss = lambda p, o: losses.policy_loss(  # noqa: E731
        Bigram(), p, table, batch, sampled_at(1), o
    )[0]
    np.testing.assert_allclose(
        jax.grad(loss)(table, options), jax.grad(loss)(table, OPTIONS), atol=1e-12
    )


def test_supervised_loss_counts_completion_tokens_only(x64):
    batch = batch_of(EXAMPLES, rows=2, length=4)
    logprobs = log_softmax(TABLE)
    per_row = np.zeros(2)
    for row, x, y, _ in transitions():
        per_row[row] += logprobs[x, y]
    table = jnp.asarray(TABLE)
    np.testing.assert_allclose(
        losses.supervised_loss(Bigram(), table, batch), -per_row.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.solution_logprobs(Bigram(), table, batch), per_row, rtol=1e-6
    )


def test_solution_chance_skips_empty_rows():
    batches = make_batches(EXAMPLES, Buckets((8,), 40))
    assert batches[0].tokens.shape == (5, 8)
    logprobs = np.zeros(2)
    for row, x, y, _ in transitions():
        logprobs[row] += log_softmax(TABLE)[x, y]
    chance = sft.solution_chance(Bigram(), jnp.asarray(TABLE, jnp.float32), batches)
    np.testing.assert_allclose(chance, np.exp(logprobs).mean(), rtol=1e-5)


# ---------------------------------------------------------------------- batches


def test_layout_of_a_batch():
    batch = batch_of([EXAMPLES[0]], rows=2, length=6)
    np.testing.assert_array_equal(batch.tokens[0], [0, 1, 2, 1, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [1, 2, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, -1, -1])
    np.testing.assert_array_equal(batch.mask[0], [0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(
        batch.behavior_logprobs[0], [0, -1.6, -2.2, -0.9, 0, 0], rtol=1e-6
    )
    assert batch.advantages.tolist() == pytest.approx([0.7, 0.0])
    assert (batch.positions[1] == -1).all() and not batch.mask[1].any()


def test_examples_go_to_the_first_bucket_that_holds_them():
    buckets = Buckets((4, 8), tokens=16)
    examples = [Example([1], [2] * n) for n in (1, 4, 5, 8, 2, 3, 4)]
    batches = make_batches(examples, buckets)
    assert [batch.tokens.shape for batch in batches] == [(4, 4), (4, 4), (2, 8)]
    assert sum(int(batch.mask.sum()) for batch in batches) == 27


def test_buckets_end_where_they_are_told():
    buckets = Buckets((48, 128), tokens=1000)
    assert buckets.up_to(354).lengths == (48, 128, 368)
    assert buckets.up_to(40).lengths == (48,)
    assert buckets.up_to(128).lengths == (48, 128)
    assert [buckets.rows(n) for n in (48, 128, 2000)] == [20, 7, 1]


def test_bad_buckets_and_examples_are_named():
    with pytest.raises(ValueError, match=r"lengths=\(8, 4\)"):
        Buckets((8, 4), 16)
    with pytest.raises(ValueError, match="tokens=0"):
        Buckets((4,), 0)
    with pytest.raises(ValueError, match=r"10 tokens does not fit.*bucket, 8; shorten"):
        make_batches([Example([1], [2] * 9)], Buckets((4, 8), 16))


def test_shapes_of_chunks_do_not_depend_on_lengths():
    buckets = Buckets((4, 8), 16)
    short = stack_chunks([Example([1], [2])] * 10, buckets, capacity=10)
    mixed = stack_chunks([Example([1], [2] * 7)] * 3, buckets, capacity=10)
    shapes = [jax.tree.map(np.shape, chunks) for chunks in (short, mixed)]
    assert shapes[0] == shapes[1]
    assert [int(bucket.num_chunks) for bucket in short] == [3, 0]
    assert [int(bucket.num_chunks) for bucket in mixed] == [0, 2]


# ----------------------------------------------------------------------- update

OPTIMIZER = make_optimizer(tiny.CONFIG.grpo)
DRAFTER = er_jax.DrafterConfig()


def some_state(policy):
    params = policy.init(jax.random.key(0))
    return TrainState(
        params=derive(policy, params, drafter=DRAFTER)[0],
        opt_state=OPTIMIZER.init(params),
        key=jax.random.key_data(jax.random.key(1)),
        step=jnp.int32(0),
        position=jnp.int32(0),
    )


def run_update(policy, state, buckets, examples):
    return update(
        policy,
        OPTIMIZER,
        state,
        None,
        stack_chunks(examples, buckets, capacity=len(examples)),
        jnp.float32(len(examples)),
        config=sampled_at(1),
        options=OPTIONS,
        drafter=DRAFTER,
    )


def random_examples(count):
    rng = np.random.default_rng(0)
    return [
        Example(
            prompt=rng.integers(0, 64, 1 + i % 3).tolist(),
            completion=rng.integers(0, 64, 1 + 2 * i).tolist(),
            behavior_logprobs=rng.uniform(-5, -3, 1 + 2 * i),
            advantage=float(rng.normal()),
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_update_does_not_depend_on_how_it_is_cut(x64):
    policy = tiny.CONFIG.model.decoder(64, "float64")
    examples = random_examples(6)
    infos, params = [], []
    for buckets in (Buckets((16,), 96), Buckets((4, 8, 16), 8)):
        state, info = run_update(policy, some_state(policy), buckets, examples)
        infos.append({name: float(value) for name, value in info.items()})
        params.append(state.params.policy)
    assert infos[0] == pytest.approx(infos[1], rel=1e-9)
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.slow
def test_update_donates_and_refreshes():
    policy = tiny.CONFIG.model.decoder(64, "float32")
    state = some_state(policy)
    old = jax.tree.map(np.array, jax.tree.map(jnp.array, state.params))
    tree_digest(state.params.policy)  # looks, and holds on to nothing
    new, info = run_update(policy, state, Buckets((16,), 96), random_examples(6))
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert leaf.is_deleted()  # the old draft too: the new one lies in its buffers
    assert float(info["grad_norm"]) > 0
    changed = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != b)), new.params.policy, old.policy
    )
    assert all(jax.tree.leaves(changed))
    fresh, _ = derive(policy, new.params.policy, drafter=DRAFTER)
    for one, other in zip(*map(jax.tree.leaves, (new.params, fresh)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_update_reuses_every_buffer_of_the_state():
    policy = tiny.CONFIG.model.decoder(64, "float32")
    state = some_state(policy)
    examples = random_examples(2)
    compiled = update.lower(
        policy,
        OPTIMIZER,
        state,
        None,
        stack_chunks(examples, Buckets((16,), 32), capacity=2),
        jnp.float32(2),
        config=sampled_at(1),
        options=OPTIONS,
        drafter=DRAFTER,
    ).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size


@pytest.mark.slow
def test_an_update_of_long_rows_keeps_no_square_of_scores():
    """Rows of 4096 tokens: a square of six heads is 403 MB a layer in float32."""
    length = 4096
    policy = arithmetic.CONFIG.model.decoder(64, "float32")
    example = Example(prompt=[1] * 2048, completion=[1] * 2049)
    lowered = update.lower(
        policy,
        OPTIMIZER,
        jax.eval_shape(lambda: some_state(policy)),
        None,
        stack_chunks([example], Buckets((length,), length), capacity=1),
        jnp.float32(2),
        config=sampled_at(1),
        options=OPTIONS,
        drafter=DRAFTER,
    )
    assert f"{length}x{length}x" not in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    # Activations of all layers, logits and gradients: 368 MB.
    assert memory.temp_size_in_bytes < policy.config.num_heads * length**2 * 4


# -------------------------------------------------------------------- controller


def test_rule_controller_steps_down_by_fours_and_ignores_the_clock():
    controller = RuleController("fixed:2")
    assert controller.gammas == (2,)

    def choose(live):
        buckets = [rows for rows in (1, 2, 4, 8, 16, 32, 64) if rows >= live]
        options = [Program(r, n, 2) for r in buckets for n in (128, 256)]
        return controller.choose(options, None, compile_s=lambda program: 1e9)

    # A batch of four rows is offered those below, and the full one.
    small = [Program(rows, 256, 2) for rows in (3, 4, 64)]
    assert controller.choose(small, small[1], compile_s=lambda program: 1e9).rows == 4

    before = controller.state_dict()
    chosen = [choose(live) for live in (64, 17, 16, 5, 4, 1)]
    assert [p.rows for p in chosen] == [64, 64, 16, 16, 4, 1]
    assert {p.cache_length for p in chosen} == {256}
    controller.observe(chosen[0], 10, np.array([0, 0, 10]), 1.0)
    assert controller.state_dict() == before


# ----------------------------------------------------------------------- metrics


def test_metrics_are_cut_back_to_a_step(tmp_path):
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    file.append({"kind": "warmup", "step": 100})
    file.append({"kind": "eval", "step": 0})
    for step in (1, 2, 3):
        file.append({"kind": "step", "step": step})
    with file.path.open("a") as stream:
        stream.write('{"kind": "step", "st')  # killed while writing
    assert [record["step"] for record in file.read()] == [100, 0, 1, 2, 3]
    assert [record["step"] for record in file.cut_after(2)] == [100, 0, 1, 2]
    file.append({"kind": "step", "step": 3})
    lines = file.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [100, 0, 1, 2, 3]


def test_digest_sees_every_bit():
    values = np.arange(4, dtype=np.float32)
    tree = {"a": values, "b": [np.ones(2, np.int8)]}
    first = tree_digest(tree)
    assert first == tree_digest(jax.tree.map(jnp.asarray, tree))
    nudged = {**tree, "a": np.nextafter(values, np.float32(9))}
    other_type = {**tree, "b": [np.ones(2, np.uint8)]}
    other_shape = {**tree, "a": values.reshape(2, 2)}
    found = {tree_digest(t) for t in (tree, nudged, other_type, other_shape)}
    assert len(found) == 4


def test_quantiles():
    found = metrics.quantiles(range(1, 101))
    assert found == {"p10": 10.9, "p50": 50.5, "p90": 90.1, "p99": 99.0, "max": 100.0}


def test_plot(tmp_path):
    timing = {"rollout_s": 1.0, "update_s": 2.0}
    length = {"p50": 10, "p90": 20, "max": 30}
    steps: list[dict[str, Any]] = [
        {"kind": "step", "step": i, "reward": 0.5, "length": length, "timing": timing,
         "logprob_gap": 1e-6}
        for i in (1, 2)
    ]  # fmt: skip
    records = [{"kind": "eval", "step": 0, "reward": 0.4}, *steps]
    report.plot(records, tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
