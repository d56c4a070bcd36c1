"""Tunix's models, learners and threads with `ErJaxRollout`; needs the extra `tunix`.

tests/test_tunix.py has what can be tested without it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Tunix's modules warn of what JAX no longer wants while they are imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    import optax
    import qwix
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import common, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rl_cluster import Role
    from tunix.rl.rollout import base_rollout

    from er_jax.integrations.tunix import ErJaxRollout

import er_jax
from er_jax.mesh import MeshAxes

ROOT = Path(__file__).resolve().parents[1]
PAD, STOP, LETTERS = 1, 2, "abcdefghijklmnopqrstuvwxyz!?."
PROMPTS = ["abc", "abc", "defg", "h"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("as_users_run_jax"),
    # Tunix's own: it reads variables by an attribute that Flax no longer wants.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def as_users_run_jax() -> Iterator[None]:
    """Run with the promotion that Tunix relies on, in all threads."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - 3] if i > 2 else f"<{i}>" for i in ids)

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return STOP

    def pad_id(self) -> int:
        return PAD


SIZES: dict[str, Any] = dict(
    num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=32, num_heads=4, head_dim=8,
    num_kv_heads=2, norm_eps=1e-6,
)  # fmt: skip


def model_of(family: str, *, tied: bool, rope_theta: int = 1_000_000) -> nnx.Module:
    """Return a small model, every parameter of which matters."""
    name = "weight_tying" if family == "Llama3" else "use_tied_embedding"
    modules: dict[str, Any] = {"Qwen2": qwen2, "Qwen3": qwen3, "Llama3": llama3}
    config = modules[family].ModelConfig(rope_theta=rope_theta, **{name: tied}, **SIZES)
    return with_values(getattr(modules[family], family)(config, rngs=nnx.Rngs(0)))


def gemma3_of(num_kv_heads: int, num_layers: int = 6, **changes: Any) -> nnx.Module:
    """Return a small Gemma 3: five local layers, whose window matters, a global one."""
    config = gemma3.ModelConfig(
        num_layers=num_layers, num_embed=32, embed_dim=16, hidden_dim=32, num_heads=4,
        head_dim=8, num_kv_heads=num_kv_heads, sliding_window_size=4,
        global_base_frequency=1_000_000, global_scale_factor=8.0,
        param_dtype=jnp.float32, **changes,
    )  # fmt: skip
    return with_values(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


def with_values(model: nnx.Module) -> nnx.Module:
    rng = np.random.default_rng(0)

    def drawn(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.standard_normal(x.shape) * 0.3 + (x.ndim == 1), x.dtype)

    nnx.update(model, jax.tree.map(drawn, nnx.state(model)))
    return model


def asked(**changes: Any) -> base_rollout.RolloutConfig:
    fields: dict[str, Any] = dict(
        max_tokens_to_generate=8, max_prompt_length=8, kv_cache_size=16,
        temperature=0.9, return_logprobs=True,
    )  # fmt: skip
    return base_rollout.RolloutConfig(**{**fields, **changes})


def engine_of(model: nnx.Module, mesh: Mesh | None = None, **also: Any) -> ErJaxRollout:
    also = {"control": "ar", "rollout_config": asked(), **also}
    return ErJaxRollout(rollout_actor=model, tokenizer=Tokenizer(), mesh=mesh, **also)


def padded(out: base_rollout.RolloutOutput) -> np.ndarray:
    rows = [np.pad(t, (0, 8 - len(t)), constant_values=PAD) for t in out.tokens]
    return np.stack(rows)


def check_scores(model: nnx.Module, engine: ErJaxRollout) -> None:
    """What was sampled, what is scored and what the learner computes agree."""
    out = engine.generate(PROMPTS, asked())
    ids = padded(out)
    wanted = common.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=jnp.asarray(out.left_padded_prompt_tokens),
        completion_tokens=jnp.asarray(ids),
        pad_id=PAD,
        eos_id=STOP,
        temperature=0.9,
    )
    found = engine.get_per_token_logps(out.left_padded_prompt_tokens, ids)
    mask = ids != PAD  # the learner's
    np.testing.assert_allclose(found * mask, wanted * mask, atol=1e-4)
    assert out.logprobs is not None
    for row, (tokens, logprobs) in enumerate(
        zip(out.tokens, out.logprobs, strict=True)
    ):
        assert len(tokens) == len(logprobs) and logprobs.dtype == np.float32
        np.testing.assert_allclose(
            logprobs * mask[row, : len(tokens)],
            wanted[row, : len(tokens)] * mask[row, : len(tokens)],
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("Qwen3", True),
        ("Qwen3", False),
        ("Qwen2", True),
        ("Qwen2", False),
        ("Llama3", True),
        ("Llama3", False),
    ],
)
def test_a_models_own_scores_are_those_of_its_rollouts(family: str, tied: bool) -> None:
    model = model_of(family, tied=tied)
    check_scores(model, engine_of(model))


@pytest.mark.parametrize(
    ("num_kv_heads", "scale"),
    [
        (1, "BY_ONE_OVER_SQRT_HEAD_DIM"),
        (2, "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"),
        (4, "BY_ONE_OVER_SQRT_HEAD_DIM"),
    ],
)
def test_a_gemma3s_own_scores_are_those_of_its_rollouts(
    num_kv_heads: int, scale: str
) -> None:
    """Its keys and values are stacked, with the queries if they are as many."""
    kind = gemma3.QueryPreAttentionNormalisation[scale]
    model = gemma3_of(num_kv_heads, query_pre_attn_norm=kind)
    check_scores(model, engine_of(model))


def test_positions_are_turned_as_the_model_does() -> None:
    """Tunix 0.1.7's Qwen3 does not read its `rope_theta`."""
    model = model_of("Qwen3", tied=True, rope_theta=100)
    with pytest.warns(RuntimeWarning, match=r"base 1e\+06, .*\(rope_theta=100\)"):
        engine = engine_of(model)
    check_scores(model, engine)


@pytest.fixture(scope="module")
def model(as_users_run_jax: None) -> nnx.Module:
    return model_of("Qwen3", tied=False)


@pytest.fixture(scope="module")
def engine(model: nnx.Module) -> ErJaxRollout:
    return engine_of(model)


def test_outputs_are_as_the_learner_expects(engine: ErJaxRollout) -> None:
    out = engine.generate(PROMPTS, asked(return_logprobs=False, eos_tokens=[5, 6]))
    assert out.logprobs is None and out.logits is None
    assert out.left_padded_prompt_tokens.shape == (4, 8)
    np.testing.assert_array_equal(
        out.left_padded_prompt_tokens[2], [PAD] * 4 + [6, 7, 8, 9]
    )
    for text, tokens in zip(out.text, out.tokens, strict=True):
        is_stopped = tokens[-1] in (5, 6, PAD)
        assert not set(tokens[:-1].tolist()) & {5, 6, PAD}
        assert is_stopped or len(tokens) == 8
        assert text == Tokenizer().decode(tokens[: len(tokens) - is_stopped].tolist())
    assert any(tokens[-1] in (5, 6) for tokens in out.tokens)
    greedy = asked(temperature=0.0, top_p=None)
    assert engine.generate(["ab"], greedy).text == engine.generate(["ab"], greedy).text
    assert (
        engine.generate(["ab"], asked()).text != engine.generate(["ab"], asked()).text
    )
    assert (engine.pad_id(), engine.eos_id(), engine.model()) == (PAD, STOP, None)


def test_equal_seeds_sample_what_the_library_does(
    model: nnx.Module, engine: ErJaxRollout
) -> None:
    prompts = [Tokenizer().encode(text) for text in PROMPTS]
    config = er_jax.RolloutConfig(
        max_new_tokens=8, temperature=0.9, stop_token_ids=(STOP, PAD), pad_id=PAD
    )
    wanted = er_jax.rollout(
        engine._policy,
        engine._sampler.params.policy,
        prompts,
        key=jax.random.key(11),
        config=dataclasses.replace(config, control="ar"),
    )
    for seed in (11, jax.random.PRNGKey(11)):
        out = engine.generate(PROMPTS, asked(seed=seed))
        np.testing.assert_array_equal(padded(out), wanted.completion_ids)
    drafting = engine_of(model, control="fixed:2")
    out = drafting.generate(PROMPTS, asked(seed=11))
    np.testing.assert_array_equal(padded(out), wanted.completion_ids)


def test_threads_get_what_one_call_gets(model: nnx.Module) -> None:
    rollouts: list[er_jax.Rollout] = []
    also: dict[str, Any] = dict(on_rollout=rollouts.append, max_wait_s=1.0)
    one = engine_of(model, **also).generate(PROMPTS, asked())
    several = engine_of(model, **also)
    rollouts.clear()
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        calls = [pool.submit(several.generate, [text], asked()) for text in PROMPTS]
        found = [call.result(300).text[0] for call in calls]
    assert len(rollouts) == 1
    wanted = sorted(zip(PROMPTS, one.text, strict=True))
    assert sorted(zip(PROMPTS, found, strict=True)) == wanted


def test_updates_stay_on_the_device(model: nnx.Module) -> None:
    drafters = (er_jax.DrafterConfig(), er_jax.DrafterConfig(bits=4))
    engine = engine_of(model, control="fixed:2", drafter=drafters)
    engine.generate(PROMPTS, asked(seed=1))
    other = model_of("Qwen3", tied=False)
    nnx.update(other, jax.tree.map(lambda x: 0.5 * x, nnx.state(other)))
    with jax.transfer_guard("disallow_explicit"):
        engine.update_params(nnx.state(other, nnx.Param), (nnx.Param,))
    params = engine._sampler.params
    layer = params.policy["layers"][0]
    kernel: Any = other.layers[0].mlp.up_proj.kernel  # type: ignore[attr-defined]
    assert layer["up_proj"] is kernel.get_value()  # nothing is stored twice
    wanted = er_jax.attach_draft(params.policy, drafters)
    jax.tree.map(np.testing.assert_array_equal, params.drafts, wanted.drafts)
    check_scores(other, engine)


def test_models_that_are_not_sampled_are_refused_by_name(model: nnx.Module) -> None:

    class Gemma4(nnx.Module):
        """A model of a family that is not sampled."""

    with pytest.raises(
        ValueError, match=r"is a Gemma4; .* samples Llama3, Qwen2, Qwen3, Gemma3 and"
    ):
        engine_of(Gemma4())
    with pytest.raises(ValueError, match="slots=3 is no option"):
        engine_of(model, slots=3)

    other_axes = Mesh(np.array(jax.devices()[:2]), ("sp",))
    with pytest.raises(ValueError, match=r"axis 'sp', which is none of .*; give axes="):
        engine_of(model, other_axes)

    class Qwen3(qwen3.Qwen3):
        """Another model of the same name: its logits are of the text backwards."""

        def __call__(self, *arguments: Any, **also: Any) -> Any:
            logits, cache = super().__call__(*arguments, **also)
            return logits[..., ::-1], cache

    other = model_of("Qwen3", tied=False)
    other.__class__ = Qwen3
    with pytest.raises(ValueError, match="its logits differ"):
        engine_of(other)


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("Qwen3", "q_proj|o_proj|up_proj"),
        ("Gemma3", "q_einsum|kv_einsum|attn_vec_einsum|up_proj"),
    ],
)
def test_lora_parameters_are_merged(family: str, modules: str) -> None:
    provider = qwix.LoraProvider(module_path=f".*({modules})", rank=2, alpha=8)
    is_gemma = family == "Gemma3"
    base = gemma3_of(2, num_layers=1) if is_gemma else model_of(family, tied=True)
    model = qwix.apply_lora_to_model(
        base,
        provider,
        **{
            k: v
            for k, v in base.get_model_input().items()  # type: ignore[attr-defined]
        },
        rngs=nnx.Rngs(1),
    )
    with pytest.raises(ValueError, match="w_lora_a first; to merge them, give"):
        engine_of(model)
    with pytest.raises(ValueError, match="is lora_scale alpha / rank"):
        engine_of(model, lora_scale=8.0)
    engine = engine_of(model, lora_scale=4.0)
    rng = np.random.default_rng(3)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, x.dtype),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, trained)
    engine.update_params(nnx.state(model, nnx.LoRAParam), (nnx.LoRAParam,))
    check_scores(model, engine)


@pytest.mark.parametrize("rows_axis", ["data", "fsdp"])
def test_a_mesh_samples_what_one_device_does(
    model: nnx.Module, engine: ErJaxRollout, rows_axis: str
) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
    graphdef, state = nnx.split(model)

    def lay_out(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec or PartitionSpec()))

    sharded = nnx.merge(
        graphdef, jax.tree.map(lay_out, state, nnx.get_partition_spec(state))
    )
    axes = MeshAxes(rows_axis, "none" if rows_axis == "fsdp" else "fsdp", "tp")
    on_mesh = engine_of(sharded, mesh, axes=axes)
    found = on_mesh.generate(PROMPTS, asked(seed=5))
    assert found.text == engine.generate(PROMPTS, asked(seed=5)).text
    texts = found.left_padded_prompt_tokens, padded(found)
    np.testing.assert_allclose(
        on_mesh.get_per_token_logps(*texts),
        engine.get_per_token_logps(*texts),
        atol=1e-5,
    )


class Watched(grpo_learner.GRPOLearner):
    """Keeps what its rollouts gave it."""

    def _generate_and_compute_advantage(self, *arguments: Any, **also: Any) -> Any:
        example = super()._generate_and_compute_advantage(*arguments, **also)
        self.__dict__.setdefault("examples", []).append(example)
        return example


def two_steps(engine: Any) -> tuple[list[Any], Any]:
    """Make two steps of GRPO; return what the learner received, and the cluster."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=model_of("Qwen3", tied=True),
        reference=model_of("Qwen3", tied=True),
        tokenizer=Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=engine,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(1e-2),
                eval_every_n_steps=100,
                max_steps=4,
                mini_batch_size=2,
                train_micro_batch_size=2,
            ),
            rollout_config=asked(return_logprobs=False),
        ),
    )

    def reward(
        prompts: list[str], completions: list[str], **unused: Any
    ) -> list[float]:
        del prompts, unused
        return [float(len(set(text))) for text in completions]

    learner = Watched(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(num_generations=4, num_iterations=2),
        reward_fns=reward,
    )
    learner.train([{"prompts": np.array(x)} for x in (["abc", "de"], ["fgh", "i"])])
    return learner.__dict__["examples"], cluster


def test_a_learner_receives_the_same_from_both_engines() -> None:
    """Two steps with Tunix's own engine, and with ours.

    Tokens differ, for the noise does; shapes, types, paddings and scores do not.
    """
    theirs, _ = two_steps("vanilla")
    ours, cluster = two_steps(functools.partial(ErJaxRollout, control="ar"))
    assert len(theirs) == len(ours) == 2
    for a, b in zip(theirs, ours, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert (x is None) == (y is None), field.name
            if x is not None:
                assert (x.shape, x.dtype) == (y.shape, y.dtype), field.name
        np.testing.assert_array_equal(a.prompt_ids, b.prompt_ids)
        np.testing.assert_array_equal(a.prompt_mask, b.prompt_mask)
        ids, mask = np.asarray(b.completion_ids), np.asarray(b.completion_mask)
        np.testing.assert_array_equal(mask, ids != PAD)
        # No pad id inside of a completion: the learner would skip it, and go on.
        np.testing.assert_array_equal(mask, np.logical_and.accumulate(mask, axis=1))
    # Before the first update policy and reference are equal: so are their scores. The
    # engine's are at the temperature of training, as the reference's.
    first = ours[0]
    mask = np.asarray(first.completion_mask)
    np.testing.assert_allclose(
        first.old_per_token_logps * mask, first.ref_per_token_logps * mask, atol=1e-4
    )
    # The weights that the engine has at the end are the trained ones.
    trained = nnx.to_flat_state(nnx.state(cluster.actor_trainer.model, nnx.Param))
    kernels = {path: leaf.get_value() for path, leaf in trained}
    engine: Any = cluster.rollout
    layer = engine._sampler.params.policy["layers"][0]
    np.testing.assert_array_equal(
        layer["q_proj"], kernels["layers", 0, "attn", "q_proj", "w"].reshape(16, -1)
    )
    second = ours[1]
    drift = np.abs(second.old_per_token_logps - second.ref_per_token_logps)
    assert np.max(drift * np.asarray(second.completion_mask)) > 1e-3


def test_the_page_runs() -> None:
    """Every block of docs/tunix.md, one after the other, with a small model."""
    page = (ROOT / "docs" / "tunix.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) > 2
    names: dict[str, Any] = dict(
        model=model_of("Qwen3", tied=True),
        reference=model_of("Qwen3", tied=True),
        tokenizer=Tokenizer(),
        reward=lambda prompts, completions, **also: [
            float(len(c)) for c in completions
        ],
        steps=[{"prompts": np.array(["ab", "cd"])}],
    )
    for block in blocks:
        exec(compile(block, "docs/tunix.md", "exec"), names)
