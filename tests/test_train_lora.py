"""Training of low-rank pairs: the update, whole runs, what checkpoints hold."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import er_jax
from configs import tiny
from er_jax.lora import has_lora
from er_jax.tools.cli import Sample
from tests.test_train import DRAFTER, OPTIMIZER, OPTIONS, random_examples, sampled_at
from train import losses
from train.batching import Buckets, batch_of, stack_chunks
from train.checkpoints import DIRECTORY, load_policy
from train.config import GRPOConfig, HFConfig, LoRAConfig, MeshConfig
from train.metrics import MetricsFile
from train.placement import Placement
from train.run import run
from train.trained import trained_part
from train.update import TrainState, derive, update

pytestmark = pytest.mark.usefixtures("unoptimized_module")

POLICY = tiny.CONFIG.model.decoder(64, "float32")
LORA = LoRAConfig(rank=4, alpha=8)
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    lora=LORA,
    grpo=dataclasses.replace(tiny.CONFIG.grpo, learning_rate=0.02),
)
KL = dataclasses.replace(OPTIONS, kl_coef=0.1)


def some_state() -> TrainState:
    params = LORA.added(POLICY.init(jax.random.key(0)), jax.random.key(2))
    # As after some steps: new pairs are the reference itself.
    pairs = jax.tree.map(lambda x: x + 0.01, er_jax.lora_pairs(params))
    params = er_jax.with_lora_pairs(params, pairs)
    return TrainState(
        params=derive(POLICY, params, drafter=DRAFTER)[0],
        opt_state=OPTIMIZER.init(pairs),
        key=jax.random.key_data(jax.random.key(1)),
        step=jnp.int32(0),
        position=jnp.int32(0),
    )


def arguments(state: TrainState) -> tuple[Any, ...]:
    chunks = stack_chunks(random_examples(6), Buckets((16,), 96), capacity=6)
    return POLICY, OPTIMIZER, state, None, chunks, jnp.float32(6)


SETTINGS: dict[str, Any] = dict(config=sampled_at(1), options=KL, drafter=DRAFTER)


def pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def frozen_of(params: er_jax.PolicyParams) -> Any:
    return er_jax.without_lora(params.policy), params.draft


@pytest.mark.slow
def test_an_update_steps_the_pairs_and_moves_nothing_else() -> None:
    state = some_state()
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 2 * 7
    before = jax.tree.map(np.array, jax.tree.map(jnp.array, state.params))
    places = pointers(frozen_of(state.params))
    new, info = update(*arguments(state), **SETTINGS)
    assert pointers(frozen_of(new.params)) == places
    jax.tree.map(
        np.testing.assert_array_equal, frozen_of(new.params), frozen_of(before)
    )
    changed = jax.tree.map(
        lambda x, y: bool(np.any(x != y)),
        er_jax.lora_pairs(new.params.policy),
        er_jax.lora_pairs(before.policy),
    )
    assert all(jax.tree.leaves(changed))
    fresh, _ = derive(POLICY, new.params.policy, drafter=DRAFTER)
    jax.tree.map(np.testing.assert_array_equal, new.params, fresh)
    # The reference is the policy without its pairs.
    batch = batch_of(random_examples(6), rows=6, length=16)
    reference = er_jax.without_lora(before.policy)
    loss = jax.jit(losses.policy_loss, static_argnums=(0, 4, 5))
    _, sums = loss(POLICY, before.policy, reference, batch, sampled_at(1), KL)
    assert float(info["kl"]) == pytest.approx(float(sums["kl"]) / 6, rel=1e-4) != 0


def test_an_update_reuses_every_buffer_and_quantizes_nothing() -> None:
    state = jax.eval_shape(some_state)
    lowered = update.lower(*arguments(state), **SETTINGS)
    assert "round_nearest_even" not in lowered.as_text()
    # Nor on a mesh, where what is gathered for rollouts is kept as well.
    placement = Placement.of(MeshConfig(2, 2, 2))
    params, gathered = jax.eval_shape(
        lambda p: placement.drafted(POLICY, p, DRAFTER), state.params.policy
    )
    spread = state.replace(params=params, gathered=gathered)
    text = update.lower(*arguments(spread), placement=placement, **SETTINGS).as_text()
    assert "round_nearest_even" not in text
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= size


@pytest.mark.slow
def test_pairs_are_gathered_for_rollouts_and_bases_are_kept() -> None:
    """Over `fsdp`, updates and rollouts have arrays of their own."""
    placement = Placement.of(MeshConfig(2, 2, 2))
    params = placement.put(POLICY, some_state().params.policy)

    def step(params: Any) -> Any:
        """Derive, change the pairs, derive again."""
        first, gathered = placement.drafted(POLICY, params, DRAFTER)
        pairs = jax.tree.map(lambda x: 2 * x, er_jax.lora_pairs(params))
        params = er_jax.with_lora_pairs(params, pairs)
        return params, *placement.drafted(POLICY, params, DRAFTER, first, gathered)

    stepped, again, gathered = jax.jit(step)(params)
    jax.tree.map(np.testing.assert_array_equal, gathered, stepped)
    weight = gathered["layers"][0]["q_proj"]
    assert weight.a.sharding.is_fully_replicated
    assert weight.base.sharding.spec == PartitionSpec(None, "model")
    wanted = er_jax.attach_draft(stepped, DRAFTER).draft
    jax.tree.map(np.testing.assert_array_equal, again.draft, wanted)


def test_what_is_wrong_with_pairs_is_refused_before_a_run(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(rank=-1), "rank=-1: give >= 0"),
        (dict(rank=2, alpha=0.0), "alpha=0.0: give > 0"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**fields)
    config = dataclasses.replace(
        CONFIG, out=tmp_path / "run", lora=LoRAConfig(rank=2, targets=("query",))
    )
    with pytest.raises(ValueError, match=r"targets=\('query',\) name no matrix"):
        run(config)
    assert not config.out.exists()


def steps_of(out: Path) -> list[dict[str, Any]]:
    records = MetricsFile(out / "metrics.jsonl").read()
    found = [r for r in records if r["kind"] == "step"]
    return [{k: v for k, v in r.items() if k != "timing"} for r in found]


@pytest.mark.slow
def test_a_run_resumes_and_saves_its_pairs_only(x64: None, tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, out=tmp_path / "whole", dtype="float64", steps=4
    )
    run(config)
    cut = dataclasses.replace(config, out=tmp_path / "cut")
    shutil.copytree(config.out, cut.out)
    shutil.rmtree(cut.out / DIRECTORY / "4")
    run(dataclasses.replace(cut, resume=True))
    assert steps_of(cut.out) == steps_of(config.out)
    assert len(steps_of(cut.out)) == 4
    (_, first, _), (_, last, _) = (load_policy(cut.out, step=s) for s in (0, 4))
    assert has_lora(last)
    for one, other in zip(
        *map(jax.tree.leaves, map(er_jax.without_lora, (first, last))), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert any(
        np.any(x != y)
        for x, y in zip(
            *map(jax.tree.leaves, map(er_jax.lora_pairs, (first, last))), strict=True
        )
    )

    def size(item: str, step: int) -> int:
        files = (cut.out / DIRECTORY / str(step) / item).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    assert (cut.out / DIRECTORY / "0" / "frozen").is_dir()
    assert not (cut.out / DIRECTORY / "4" / "frozen").exists()
    number = sum(leaf.size for leaf in jax.tree.leaves(trained_part(last)))
    assert number < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(last))
    steps = steps_of(cut.out)
    assert max(record["logprob_gap"] for record in steps) < 1e-6
    assert steps[0]["kl"] >= 0 and steps[-1]["kl"] > 0
    with pytest.raises(ValueError, match=r"other settings \(lora.rank: 4 -> 2\)"):
        run(dataclasses.replace(cut, resume=True, lora=LoRAConfig(rank=2, alpha=8)))
    shutil.rmtree(cut.out / DIRECTORY / "0")
    with pytest.raises(
        (ValueError, FileNotFoundError), match="no checkpoint of step 0"
    ):
        run(dataclasses.replace(cut, resume=True, steps=5))


@pytest.mark.slow
def test_a_trained_checkpoint_is_its_base_and_its_adapter(tmp_path: Path) -> None:
    from tests.test_train_hf import make_checkpoint

    base = make_checkpoint("qwen3", tmp_path / "base")
    data = tmp_path / "sums.jsonl"
    problems = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]
    data.write_text("".join(json.dumps(p) + "\n" for p in problems))
    grpo = GRPOConfig(
        prompts_per_step=2, group_size=4, max_new_tokens=8, max_slots=8,
        learning_rate=0.01, bucket_lengths=(16,), chunk_tokens=128,
    )  # fmt: skip
    run(
        HFConfig(
            model=base, data=data, out=tmp_path / "run", steps=2, num_eval=2,
            control="fixed:2", reward="tests.test_train_hf:long", grpo=grpo,
            lora=LoRAConfig(rank=2, targets=("q_proj", "down_proj")),
        )
    )  # fmt: skip
    policy, plain = er_jax.load_hf(base)
    adapted = er_jax.load_peft_adapter(tmp_path / "run" / "adapter-2", policy, plain)
    _, trained = er_jax.load_hf(tmp_path / "run" / "trained-2")
    merged = er_jax.merge_lora(adapted)
    jax.tree.map(np.testing.assert_array_equal, trained, merged)
    layer, old = trained["layers"][0], plain["layers"][0]
    assert np.abs(layer["q_proj"] - old["q_proj"]).max() > 1e-5
    np.testing.assert_array_equal(layer["k_proj"], old["k_proj"])
    ways: tuple[dict[str, Any], ...] = (
        dict(model=base, adapter=tmp_path / "run" / "adapter-2"),
        dict(model=tmp_path / "run" / "trained-2"),
    )
    settings: dict[str, Any] = dict(prompt=("1+1=",), max_new_tokens=8, temperature=0)
    said = []
    for number, way in enumerate(ways):
        file = tmp_path / f"{number}.jsonl"
        Sample(control="ar", out=file, **settings, **way).run()
        said.append(json.loads(file.read_text())["completion"])
    assert said[0] == said[1]


@pytest.mark.long
def test_a_run_on_a_mesh_is_that_of_one_device(x64: None, tmp_path: Path) -> None:
    model = dataclasses.replace(CONFIG.model, num_heads=4, num_kv_heads=2, head_dim=8)
    config = dataclasses.replace(CONFIG, model=model, dtype="float64", steps=2)
    alone = dataclasses.replace(config, out=tmp_path / "alone")
    many = dataclasses.replace(config, out=tmp_path / "many", mesh=MeshConfig(2, 2, 2))
    run(alone)
    run(dataclasses.replace(many, steps=1))
    run(dataclasses.replace(many, mesh=MeshConfig(), resume=True))
    for one, other in zip(steps_of(alone.out), steps_of(many.out), strict=True):
        assert one["reward"] == other["reward"]
        assert one["num_tokens"] == other["num_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=1e-9)
    pairs = (er_jax.lora_pairs(load_policy(c.out)[1]) for c in (alone, many))
    for one, other in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)
