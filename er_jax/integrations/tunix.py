"""Tunix trains, er_jax samples: `ErJaxRollout`, a rollout engine for its clusters.

    ClusterConfig(rollout_engine=ErJaxRollout, ...)
    ClusterConfig(rollout_engine=functools.partial(ErJaxRollout, max_slots=32), ...)

It takes Tunix's Llama 3, Qwen 2, Qwen 3 and Gemma 3 (text) models, with any sharding,
and with LoRA parameters. Needs the extra `tunix`. Left out: which array becomes which
parameter (`tunix_families`, `tunix_weights`), what is asked and given back
(`tunix_calls`), rollouts for several threads (`tunix_sampling`).
docs/tunix.md shows it in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from er_jax.config import RolloutConfig
from er_jax.control.controller import Controller
from er_jax.decoder import Decoder
from er_jax.devices import default_device
from er_jax.engine.adoption import Adoption, run_logits
from er_jax.integrations import tunix_calls
from er_jax.integrations.tunix_calls import GenerateCall
from er_jax.integrations.tunix_families import EMBED, family_of
from er_jax.integrations.tunix_sampling import CallSampler
from er_jax.integrations.tunix_weights import LORA, Weights, placed
from er_jax.mesh.layout import rollout_mesh
from er_jax.mesh.rules import MeshAxes
from er_jax.result import Rollout

try:
    from flax import nnx
    from tunix.generate.tokenizer_adapter import TokenizerAdapter
    from tunix.rl.rollout import base_rollout
except ImportError as error:
    raise ImportError(
        "er_jax.integrations.tunix needs Tunix, which is not installed; install it "
        "with: pip install 'er-jax[tunix]'"
    ) from error

TUNIX_AXES = MeshAxes(data="data", fsdp="fsdp", model="tp")

# Whatever their configuration says, Tunix 0.1.7's Llama3 and Qwen3 turn by this base.
OTHER_THETA = 1e6

# Tokens by which a model is compared with er_jax's decoder, and how far the logits may
# be from each other, relative to their spread: more than bfloat16 and TPUs' products
# round off, less than a wrong weight does. Closer than the last, they are the same.
CHECKED_TOKENS, MOST_DIFFERENCE, EQUAL = 16, 0.1, 1e-5


class ErJaxRollout(base_rollout.BaseRollout):
    """A rollout engine of Tunix that samples with er_jax.

    The tokens follow the model's distribution exactly. Groups of equal prompts are
    prefilled once. Calls of `generate` from several threads are run together.

    With `seed=None` in Tunix's `RolloutConfig` no two completions share their noise; it
    follows from `seed` here, the number of weight updates so far, the prompt and how
    often that prompt was asked for since. With a seed there, a call samples what
    `er_jax.rollout(..., key=jax.random.key(seed))` does, in every call again.

    Args:
      rollout_actor: the model. tokenizer: Tunix's adapter, or what it can adapt.
      mesh: of the rollout; None is the default device.
      rollout_config: Tunix's, of training.
      axes: names of the mesh's axes. Weights are sharded as the model's are, and rows
        over the axis `data`: naming Tunix's "fsdp" as `data` spreads the rows over
        those devices, each of which then holds whole weights.
      seed: of the noise of calls without a seed of their own.
      max_wait_s: seconds that a call waits for calls of other threads.
      lora_scale: alpha / rank of LoRA parameters, which are merged into the weights.
      controller: decides when to draft; None makes one.
      on_rollout: called with the `Rollout` of every batch, for its `stats`.
      options: settings of `er_jax.RolloutConfig` that Tunix's has no word for: accept,
        attention, control, drafter, gammas, logprobs, max_slots, min_p.
    Raises:
      ValueError: a model that er_jax does not sample, parameters it has no place for,
        or a wrong option; or the model's own logits differ from er_jax's.
    """

    def __init__(
        self,
        *,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: Mesh | None,
        rollout_config: Any,
        axes: MeshAxes = TUNIX_AXES,
        seed: int = 0,
        max_wait_s: float = 0.02,
        lora_scale: float | None = None,
        controller: Controller | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
        **options: Any,
    ) -> None:
        is_adapted = isinstance(tokenizer, TokenizerAdapter)
        self._tokenizer = tokenizer if is_adapted else TokenizerAdapter(tokenizer)
        self._options = tunix_calls.checked_options(options)
        self._asked, self._actor = rollout_config, rollout_actor
        config = self._settings(rollout_config)
        family = family_of([kind.__name__ for kind in type(rollout_actor).__mro__])
        own = _arrays_of(nnx.state(rollout_actor, nnx.Param))
        _check_on_device(own)
        weights = Weights.of(
            family,
            rollout_actor.config,
            own,
            dtype=rollout_config.data_type,
            lora_scale=lora_scale,
        )
        # With one device there is no need of a mesh.
        mesh = None if mesh is None or mesh.empty else mesh
        devices = [default_device()] if mesh is None else list(mesh.devices.flat)
        self._device = devices[0]
        self._theirs = mesh if len(devices) > 1 else None
        ours = shardings = None
        arrays = self._placed(own)
        if self._theirs is not None:
            _check_axes(self._theirs, axes)
            ours = rollout_mesh(self._theirs, axes)
            shardings = weights.shardings(arrays, ours, axes, config.drafters)
        kept = weights.kept(arrays, shardings and shardings.policy)
        self._adopt = Adoption(weights.convert, kept, config.drafters, shardings)
        self._policy = _checked_policy(
            weights, self._adopt, rollout_actor, arrays, mesh
        )
        self._sampler = CallSampler(
            self._policy,
            controller or Controller(config.control, config.gammas),
            seed=seed,
            max_wait_s=max_wait_s,
            usual_limit=config.max_new_tokens,
            device=self._device,
            mesh=ours,
            on_rollout=on_rollout,
        )
        self._sampler.update(lambda: self._adopt(arrays))

    # -- what Tunix calls

    def generate(
        self, prompts: list[str], rollout_config: Any, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        """Sample a completion of every prompt; threads may call at once.

        Args:
          prompts: texts. rollout_config: Tunix's settings.
        Returns:
          Tunix's `RolloutOutput`: `tokens` hold the token that ended a completion,
          which the loss must see, and `text` does not.
        """
        del kwargs
        call = GenerateCall(
            [tunix_calls.tokenized(text, self._tokenizer) for text in prompts],
            self._settings(rollout_config),
            tunix_calls.key_of(rollout_config.seed),
        )
        done = self._sampler.sample(call)
        has_logprobs = rollout_config.return_logprobs
        return base_rollout.RolloutOutput(
            text=[tunix_calls.text_of(c, self._tokenizer) for c in done],
            logits=None,
            tokens=[c.token_ids for c in done],
            left_padded_prompt_tokens=tunix_calls.left_padded(
                call.prompts, rollout_config.max_prompt_length, self.pad_id()
            ),
            logprobs=[c.logprobs for c in done] if has_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: Any, completion_tokens: Any, completion_mask: Any = None
    ) -> jax.Array:
        """Return the log-probabilities of completions, float32 `[B, C]`.

        They are those of the weights that are sampled from, at the temperature of
        training, as in the learner's loss: log softmax(logits / temperature).

        Args:
          prompt_tokens: `[B, P]`, left-padded. completion_tokens: `[B, C]`.
          completion_mask: `[B, C]`; None is every token but the pad id.
        """
        prompt, completion = jnp.asarray(prompt_tokens), jnp.asarray(completion_tokens)
        if completion_mask is None:
            completion_mask = completion != self.pad_id()
        with self._sampler.placement():
            return tunix_calls.completion_logprobs(
                self._policy,
                self._sampler.params,
                (prompt, prompt != self.pad_id()),
                (completion, jnp.asarray(completion_mask).astype(bool)),
                self._settings(self._asked),
            )

    def update_params(
        self, params: Any, filter_types: tuple[Any, ...] | None = None
    ) -> None:
        """Take new weights, and derive their drafts, on the device.

        Rollouts that are running go on with the weights that they began with.

        Args:
          params: an `nnx.State` of all parameters, or of the LoRA parameters alone,
            which are merged with the actor's own weights. filter_types: unused.
        """
        del filter_types
        new = _arrays_of(params)
        if any(LORA.fullmatch(name) for name in new):
            new = {**_arrays_of(nnx.state(self._actor, nnx.Param)), **new}
        arrays = self._placed(new)
        self._sampler.update(lambda: self._adopt(arrays))

    def pad_id(self) -> int:
        """Return the tokenizer's pad id."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Return the tokenizer's end-of-sequence id."""
        return self._tokenizer.eos_id()

    def model(self) -> Any:
        """Return None: there is no module, so Tunix sends every update."""
        return None

    # -- how it is done

    def _settings(self, asked: Any) -> RolloutConfig:
        return tunix_calls.settings_of(
            asked, eos_id=self.eos_id(), pad_id=self.pad_id(), options=self._options
        )

    def _placed(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return placed(arrays, self._theirs, self._device)


def _arrays_of(state: Any) -> dict[str, jax.Array]:
    """Return the arrays of an `nnx.State` by their paths, joined by slashes."""
    found = {}
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        found["/".join(map(str, path))] = value
    return found


def _check_on_device(arrays: Mapping[str, jax.Array]) -> None:
    for name, array in arrays.items():
        if array.sharding.memory_kind == "pinned_host":
            raise ValueError(
                f"rollout_actor: {name} is in the host's memory; er_jax keeps its "
                "weights on the device: set offload_to_cpu=False in ClusterConfig"
            )


def _check_axes(mesh: Mesh, axes: MeshAxes) -> None:
    known = dataclasses.astuple(axes)
    for name in mesh.axis_names:
        if name not in known:
            raise ValueError(
                f"mesh has an axis {name!r}, which is none of {known}; give "
                "axes=er_jax.mesh.MeshAxes(...) with its own names to ErJaxRollout"
            )


def _checked_policy(
    weights: Weights,
    adopt: Adoption,
    model: Any,
    arrays: dict[str, jax.Array],
    mesh: Mesh | None,
) -> Decoder:
    """Return the decoder whose logits are those of the model.

    Both run the same few tokens. LoRA parameters begin at a product of zero, which
    would hide a wrong scale; here they have other values.

    Raises:
      ValueError: no decoder's logits are.
    """
    rng, arrays = np.random.default_rng(0), dict(arrays)
    tokens = rng.integers(0, weights.policy.vocab_size, CHECKED_TOKENS)
    arrays = {
        name: _lora_values(name, arrays, weights, rng)
        if name.endswith("_lora_b")
        else x
        for name, x in arrays.items()
    }
    params = adopt(arrays).policy
    wanted = _own_logits(model, arrays, tokens, mesh)
    stated = weights.policy.config.rope_theta
    errors: dict[float, float] = {}
    for theta in (stated, OTHER_THETA):
        if min(errors.values(), default=1.0) > EQUAL:
            policy = _with_theta(weights.policy, theta)
            found = run_logits(policy, params, jnp.asarray(tokens, jnp.int32))
            errors[theta] = _distance(np.array(found, np.float32), wanted)
    theta = min(errors, key=errors.__getitem__)
    if not errors[theta] <= MOST_DIFFERENCE:
        raise ValueError(
            "rollout_actor: its logits differ from those of er_jax's decoder by "
            f"{errors[theta]:.2g} of their spread, so it computes something else than "
            "Tunix's class of that name"
            + ("; is lora_scale alpha / rank?" if weights.lora_scale else "")
        )
    if theta != stated:
        warnings.warn(
            f"rollout_actor: the model turns positions by the base {theta:g}, whatever "
            f"its configuration says (rope_theta={stated:g}); er_jax samples from the "
            "model as it is",
            RuntimeWarning,
            stacklevel=3,
        )
    return _with_theta(weights.policy, theta)


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return how far logits `[T, V]` are apart, relative to the spread of `wanted`."""
    found, wanted = (x - x.mean(axis=-1, keepdims=True) for x in (found, wanted))
    spread = np.sqrt(np.mean(wanted**2)) + np.finfo(np.float32).tiny
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / spread)


def _with_theta(policy: Decoder, theta: float) -> Decoder:
    return Decoder(dataclasses.replace(policy.config, rope_theta=theta))


def _lora_values(
    name: str, arrays: Mapping[str, jax.Array], weights: Weights, rng: Any
) -> jax.Array:
    """Return values for a LoRA parameter B that make the product as large as W."""
    x, base = arrays[name], arrays[name.removesuffix("_lora_b")]
    a = arrays[name.removesuffix("b") + "a"]
    size = jnp.std(base) / (abs(weights.lora_scale or 1) * jnp.std(a) * len(x) ** 0.5)
    drawn = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    return jax.device_put(
        (drawn * size.astype(jnp.float32)).astype(x.dtype), x.sharding
    )


def _own_logits(
    model: Any, arrays: Mapping[str, jax.Array], tokens: np.ndarray, mesh: Mesh | None
) -> np.ndarray:
    """Return a Tunix model's logits of a text, `[T, V]`, token by token.

    So it decodes, and so flash attention, which takes whole blocks, is not in the way.
    """
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, leaf in flat.items():
        name = "/".join(map(str, path))
        if name in arrays:
            flat[path] = leaf.replace(arrays[name])
    state = nnx.from_flat_state(flat)
    size = len(tokens)
    dtype = getattr(model.config, "dtype", None)
    if dtype is None:
        dtype = arrays[EMBED.theirs].dtype
    if hasattr(model, "init_cache"):
        cache = model.init_cache(1, size, dtype)
    else:
        shape = (1, size, model.config.num_kv_heads, model.config.head_dim)
        entries = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        entries["end_index"] = jnp.zeros(1, jnp.int32)
        cache = {f"layer_{i}": entries for i in range(model.config.num_layers)}

    def step(cache: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        seen = jnp.arange(size) <= place
        logits, cache = nnx.merge(graphdef, state)(
            jnp.asarray(tokens, jnp.int32)[place][None, None],
            place[None, None],
            cache,
            seen[None, None],
        )
        return cache, logits[0, 0]

    with mesh if mesh is not None else contextlib.nullcontext():
        _, logits = jax.lax.scan(step, cache, jnp.arange(size, dtype=jnp.int32))
    return np.array(logits, np.float32)
