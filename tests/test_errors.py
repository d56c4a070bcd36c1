"""Wrong arguments: each message names argument, value, limit and remedy, before work.

Nothing may have been compiled by the time a call is refused. The policy here is no
other test's, so whatever was compiled for it would be seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import er_jax
from er_jax import devices
from er_jax.drafter import DrafterConfig, PolicyParams
from tests.conftest import CompileCount
from tests.small import small_policy

pytestmark = pytest.mark.usefixtures("unoptimized_module")

CompileCounter = Callable[[], AbstractContextManager[CompileCount]]

SIZES = er_jax.DecoderConfig(
    vocab_size=26,
    dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    hidden_dim=32,
    rope_theta=201.0,
)
GOOD: dict[str, Any] = {"max_new_tokens": 4, "control": "ar"}
KEY: Any = np.array([1, 2], np.uint32)

_widths = itertools.count(34, 2)


def fresh(**changes: Any) -> tuple[er_jax.Decoder, Any]:
    """Return a policy and parameters of sizes that nothing was compiled for."""
    sizes = {"hidden_dim": next(_widths)} | changes
    policy = er_jax.Decoder(dataclasses.replace(SIZES, **sizes))
    return policy, constant(policy)


def unused(**changes: Any) -> tuple[er_jax.Decoder, Any]:
    """Return a policy and parameters for calls that sample: no other test's engine."""
    policy = small_policy(f"errors {next(_widths)}", **changes)
    return policy, constant(policy)


def constant(policy: er_jax.Decoder) -> Any:
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)


def rollout(policy: Any, params: Any, prompts: Any = None, **options: Any) -> Any:
    names = ("key", "sequence_ids", "controller", "mesh")
    given = {name: options.pop(name) for name in names if name in options}
    return er_jax.rollout(
        policy,
        params,
        [[1, 2, 3]] if prompts is None else prompts,
        config=er_jax.RolloutConfig(**(GOOD | options)),
        **({"key": KEY} | given),
    )


class Refused:
    """Calls `rollout`, and expects a message and no compilation."""

    def __init__(self, counter: CompileCounter) -> None:
        self.counter = counter

    def __call__(
        self, parts: Sequence[str], model: Any = None, **arguments: Any
    ) -> str:
        policy, params = model or fresh()
        with self.counter() as compiled, pytest.raises(ValueError) as error:
            rollout(policy, params, **arguments)
        message = str(error.value)
        for part in parts:
            assert part in message, message
        assert compiled.count == 0, compiled
        return message


@pytest.fixture
def refused(compile_counter: CompileCounter) -> Refused:
    return Refused(compile_counter)


# Prompts.


def test_no_prompts(refused: Refused) -> None:
    refused(["prompts is empty", "at least one prompt"], prompts=[])


@pytest.mark.parametrize("empty", [[], (), np.zeros(0, np.int32)])
def test_an_empty_prompt(refused: Refused, empty: Any) -> None:
    refused(
        ["prompts[1] is empty", "at least one token", "beginning-of-sequence"],
        prompts=[[1], empty, [2]],
    )


@pytest.mark.parametrize("token", [26, 10**9, -1])
def test_a_token_outside_the_vocabulary(refused: Refused, token: int) -> None:
    refused(
        ["prompts[1]", f"token id {token}", "0 .. 25", "tokenizer"],
        prompts=[[1], [2, token, 3]],
    )


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ([1, 2, 3], "shape ()"),
        ([[[1, 2]]], "shape (1, 2)"),
        ([[1.0, 2.0]], "dtype float64"),
        (["hello"], "dtype <U5"),
        ([[True, False]], "dtype bool"),
    ],
)
def test_prompts_that_are_not_token_ids(
    refused: Refused, prompts: Any, found: str
) -> None:
    refused(
        ["prompts[0]", found, "flat sequence of integer token ids"], prompts=prompts
    )


def test_a_prompt_over_the_limit(refused: Refused) -> None:
    short = fresh(max_length=20)
    refused(
        [
            "prompts[1] has 17 tokens",
            "max_new_tokens=4",
            "20 positions",
            "shorten it to 16 tokens",
            "lower max_new_tokens",
        ],
        short,
        prompts=[[1] * 16, [1] * 17],
    )
    refused(
        ["prompts[0] has 1 tokens", "max_new_tokens=20", "shorten it to 0 tokens"],
        short,
        prompts=[[1]],
        max_new_tokens=20,
    )


def test_a_prompt_at_the_limit_is_fine() -> None:
    out = rollout(*unused(max_length=20), [[1] * 16])
    assert out.lengths.tolist() == [4]


# Configuration.


@pytest.mark.parametrize("name", ["n", "max_new_tokens", "max_slots"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(refused: Refused, name: str, value: int) -> None:
    refused([f"{name}={value}", "at least 1"], **{name: value})


@pytest.mark.parametrize("name", ["n", "max_new_tokens", "max_slots", "top_k"])
def test_counts_that_are_not_whole(refused: Refused, name: str) -> None:
    refused([f"{name}=2.5", "whole number"], **{name: 2.5})


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("temperature", -0.1, ["temperature=-0.1", "0", "greedy"]),
        ("temperature", float("nan"), ["temperature=nan", "0", "greedy"]),
        ("temperature", float("inf"), ["temperature=inf", "0", "greedy"]),
        ("top_k", -1, ["top_k=-1", "0", "off"]),
        ("top_p", 0.0, ["top_p=0.0", "above 0", "at most 1", "off"]),
        ("top_p", 1.5, ["top_p=1.5", "above 0", "at most 1", "off"]),
        ("top_p", float("nan"), ["top_p=nan", "above 0", "at most 1", "off"]),
        ("min_p", -0.5, ["min_p=-0.5", "0.0", "1.0", "off"]),
        ("min_p", 1.01, ["min_p=1.01", "0.0", "1.0", "off"]),
        ("min_p", float("nan"), ["min_p=nan", "0.0", "1.0", "off"]),
        ("accept", "all", ["accept='all'", "'coupled'", "'token'", "'block'"]),
        ("accept", None, ["accept=None", "'coupled'", "'token'", "'block'"]),
        ("attention", "fast", ["attention='fast'", "'auto'", "'kernel'"]),
        (
            "logprobs",
            "log",
            ["logprobs='log'", "'raw'", "'temperature'", "'processed'"],
        ),
        ("control", "fast", ["control='fast'", "'best'", "'ar'", "'fixed:g'"]),
        ("control", "fixed:x", ["control='fixed:x'", "whole number"]),
        ("stop_token_ids", (3, 26), ["stop_token_ids", "26", "0 .. 25"]),
        ("stop_token_ids", (-1,), ["stop_token_ids", "-1", "0 .. 25"]),
        ("pad_id", 2**31, ["pad_id=2147483648", "int32"]),
    ],
)
def test_values_out_of_range(
    refused: Refused, name: str, value: Any, parts: list[str]
) -> None:
    refused(parts, **{name: value})


@pytest.mark.parametrize(
    ("gammas", "parts"),
    [
        ((2, 4), ["gammas=(2, 4)", "must contain 0", "add 0", "fixed:g"]),
        ((), ["gammas=()", "must contain 0"]),
        ((0, -2), ["gammas=(0, -2)", "at least 0"]),
    ],
)
def test_gammas(refused: Refused, gammas: tuple[int, ...], parts: list[str]) -> None:
    refused(parts, control="best", gammas=gammas)


def test_lists_do_where_tuples_do() -> None:
    """As they come out of a configuration file."""
    policy, params = unused()
    lists = {"gammas": [0, 2], "stop_token_ids": [3], "control": "fixed:2"}
    for controller in (None, er_jax.Controller("fixed:2", [0, 2])):
        out = rollout(policy, params, controller=controller, **lists)
        assert out.completion_ids.shape == (1, 4)


def test_a_limit_that_is_met_is_no_error() -> None:
    er_jax.RolloutConfig(
        max_new_tokens=1,
        n=1,
        max_slots=1,
        temperature=0,
        top_k=0,
        top_p=1,
        min_p=1,
        gammas=(0,),
    )


# Keys, ids, controllers, meshes.


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (42, "42"),
        (None, "None"),
        (np.zeros(4, np.uint32), "(4,)"),
        (np.zeros((2, 2), np.uint32), "(2, 2)"),
        (np.array([0.5, 1.5]), "float64"),
    ],
)
def test_what_is_not_a_key(refused: Refused, key: Any, found: str) -> None:
    refused(["key", found, "jax.random.key"], key=key)


def test_several_keys(refused: Refused) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    refused(["key has shape (3,)", "jax.random.key"], key=keys)


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([0], ["shape (1,)", "3 completions", "prompts times n"]),
        ([0, 1, 2, 3], ["shape (4,)", "3 completions"]),
        ([[0, 1, 2]], ["shape (1, 3)", "3 completions"]),
        ([0, 1, -1], ["integers", "0", "2**31 - 1"]),
        ([0, 1, 2**31], ["integers", "0", "2**31 - 1"]),
        ([0.0, 1.0, 2.0], ["integers", "0", "2**31 - 1"]),
        ([0, 1, 1], ["1", "twice"]),
    ],
)
def test_wrong_sequence_ids(refused: Refused, ids: Any, parts: list[str]) -> None:
    refused(["sequence_ids", *parts], sequence_ids=ids, n=3)


def test_a_controller_of_another_kind(refused: Refused) -> None:
    message = refused(
        ["(0, 2, 4, 6, 8)", "config.control='ar'", "(0,)", "er_jax.Controller("],
        controller=er_jax.Controller("best"),
    )
    assert message.startswith("controller")
    refused(
        ["(0, 2)", "config.control='best'", "(0, 4)"],
        controller=er_jax.Controller("best", (0, 2)),
        control="best",
        gammas=(0, 4),
    )


def test_a_mesh(refused: Refused) -> None:
    refused(["mesh='a mesh'", "jax.sharding.Mesh", "None"], mesh="a mesh")
    named = Mesh(np.array(jax.devices()[:1]), ("rows",))
    refused(["mesh", "'rows'", "rollout_mesh"], mesh=named)


# Parameters.


def abstract_draft(policy: er_jax.Decoder) -> Any:
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.eval_shape(lambda p: er_jax.quantize(p, DrafterConfig()), shapes)


def test_a_draft_of_other_shapes(refused: Refused) -> None:
    policy, params = fresh()
    draft = abstract_draft(fresh(hidden_dim=30)[0])
    refused(
        ["params.draft", "layers/0/", "30", "er_jax.attach_draft"],
        (policy, PolicyParams(policy=params, draft=draft)),
        control="fixed:2",
    )


def test_a_draft_of_another_structure(refused: Refused) -> None:
    policy, params = fresh()
    deep = dataclasses.replace(policy.config, num_layers=2)
    wrong: list[Any] = [abstract_draft(er_jax.Decoder(deep)), None, {}, [1, 2]]
    for draft in wrong:
        refused(
            ["params.draft", "structure", "er_jax.attach_draft"],
            (policy, PolicyParams(policy=params, draft=draft)),
            control="fixed:2",
        )


def test_parameters_of_another_policy(refused: Refused) -> None:
    policy, _ = fresh()
    for params in (fresh(dim=32)[1], {"table": np.ones((26, 26), np.float32)}, None):
        refused(["params", "policy"], (policy, params))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_parameters(compile_counter: CompileCounter, value: float) -> None:
    """Found by a small program of its own, which is all that may be compiled."""
    policy, params = fresh()
    params["layers"][0]["up_proj"][3, 4] = value
    draft = fresh(hidden_dim=policy.config.hidden_dim)[1]
    for given in (params, PolicyParams(policy=params, draft=draft)):
        with compile_counter() as compiled, pytest.raises(ValueError) as error:
            rollout(policy, given, control="fixed:2")
        message = str(error.value)
        assert "params" in message
        assert "layers/0/up_proj" in message
        assert "down_proj" not in message
        assert "last finite parameters" in message
        assert set(compiled.names) <= {"jit(run_finite_check)"}


def test_many_nonfinite_parameters_are_not_all_named() -> None:
    policy, params = fresh()
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    with pytest.raises(ValueError, match="and others"):
        rollout(policy, bad)


def test_weights_that_groups_do_not_divide(refused: Refused) -> None:
    refused(
        ["group_size=5", "divide", "DrafterConfig.skip"],
        control="fixed:2",
        drafter=DrafterConfig(group_size=5),
    )


# Memory.


def test_a_cache_that_cannot_fit(refused: Refused) -> None:
    """A million rows of a thousand positions of 64 bytes and more."""
    message = refused(
        ["max_slots=1000000", "1024 positions", "GB", "parameters", "draft", "cache"],
        prompts=[[1, 2]] * 1000,
        n=1000,
        max_slots=10**6,
        max_new_tokens=1000,
    )
    assert "lower max_slots or max_new_tokens" in message
    needed = float(message.split(" need ")[1].split(" GB")[0])
    position = 2 * 8 * 4 + 4 + 4  # keys and values, token, log-probability
    assert needed == pytest.approx(10**6 * 1024 * position / 1e9, rel=0.01)


def test_memory_counts_parameters_draft_and_cache(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed to the byte it runs, with one byte less it does not."""
    policy, params = unused()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    drafted = jax.device_get(er_jax.attach_draft(params, DrafterConfig()))
    draft = sum(leaf.nbytes for leaf in jax.tree.leaves(drafted.draft))
    states = 1 * 64 * (2 * 8 * 4 + 8)
    for given, needed in (
        (drafted, weights + draft + states),
        (params, weights + states),
    ):
        monkeypatch.setattr(devices, "device_memory_bytes", lambda n=needed: n - 1)
        refused(["max_slots=1", "the device has"], (policy, given))
        monkeypatch.setattr(devices, "device_memory_bytes", lambda n=needed: n)
        assert rollout(policy, given).lengths.tolist() == [4]


def test_a_prompt_that_cannot_fit(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, four tokens to make: neither is what should be lowered."""
    monkeypatch.setattr(devices, "device_memory_bytes", lambda: 10**6)
    refused(["max_slots=1", "131200 positions", "prompts"], prompts=[[1] * 100_000])


def test_unknown_memory_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_memory_bytes", lambda: None)
    assert rollout(*unused()).lengths.tolist() == [4]


# Arguments of the wrong type.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"gammas": (0, 2.5), "control": "best"}, ["gammas[1]=2.5", "whole number"]),
        ({"gammas": 4, "control": "best"}, ["gammas=4", "gammas=(4,)"]),
        ({"gammas": "024", "control": "best"}, ["gammas='024'", "tuple"]),
        ({"gammas": (0, True), "control": "best"}, ["gammas[1]=True"]),
        ({"stop_token_ids": 3}, ["stop_token_ids=3", "stop_token_ids=(3,)"]),
        ({"stop_token_ids": (2.5,)}, ["stop_token_ids[0]=2.5", "whole number"]),
        ({"stop_token_ids": "3"}, ["stop_token_ids='3'", "tuple"]),
        ({"stop_token_ids": (None,)}, ["stop_token_ids[0]=None"]),
        ({"temperature": "1"}, ["temperature='1'", "must be a number"]),
        ({"temperature": None}, ["temperature=None", "must be a number"]),
        ({"temperature": True}, ["temperature=True", "must be a number"]),
        ({"temperature": np.ones((1, 2))}, ["temperature=", "must be a number"]),
        ({"temperature": np.ones(2)}, ["temperature of 2 prompts", "there are 1"]),
        ({"temperature": []}, ["temperature has 0 values", "one number for all"]),
        ({"temperature": (1, "1")}, ["temperature[1]='1'", "must be a number"]),
        ({"temperature": (1, -1)}, ["temperature[1]=-1.0", "greedy"]),
        ({"max_new_tokens": (4, 0)}, ["max_new_tokens[1]=0", "at least 1"]),
        ({"max_new_tokens": (4, 2.5)}, ["max_new_tokens[1]=2.5", "whole number"]),
        ({"top_p": (1.0, 2.0)}, ["top_p[1]=2.0", "at most 1"]),
        ({"top_k": (1,), "top_p": (1, 1)}, ["top_p has 2 values, and top_k 1"]),
        ({"n": (1, 2)}, ["n=(1, 2)", "whole number"]),
        ({"min_new_tokens": -1}, ["min_new_tokens=-1", "0"]),
        ({"min_new_tokens": 5}, ["min_new_tokens=5", "max_new_tokens=4", "lower"]),
        (
            {"min_new_tokens": (1, 3), "max_new_tokens": (1, 2)},
            ["min_new_tokens=3", "max_new_tokens=2"],
        ),
        ({"banned_ids": 3}, ["banned_ids=3", "banned_ids=(3,)"]),
        ({"banned_ids": (26,)}, ["banned_ids holds 26", "0 .. 25"]),
        ({"banned_ids": range(26)}, ["banned_ids leave none of 26", "fewer"]),
        (
            {"banned_ids": range(25), "stop_token_ids": (25,), "min_new_tokens": 1},
            ["banned_ids and stop_token_ids (min_new_tokens) leave none of 26"],
        ),
        ({"logit_bias": 3}, ["logit_bias=3", "mapping"]),
        ({"logit_bias": {3: "1"}}, ["logit_bias[3]='1'", "must be a number"]),
        ({"logit_bias": {3: -np.inf}}, ["logit_bias[3]=-inf", "banned_ids"]),
        ({"logit_bias": {3.5: 1}}, ["token 3.5 of logit_bias", "whole number"]),
        ({"logit_bias": {26: 1}}, ["logit_bias holds 26", "0 .. 25"]),
        ({"stop_sequences": 3}, ["stop_sequences=3", "((7, 2),)"]),
        ({"stop_sequences": (3, 4)}, ["stop_sequences[0]=3"]),
        ({"stop_sequences": ((3,), ())}, ["stop_sequences[1] is empty"]),
        ({"stop_sequences": ((3, 26),)}, ["stop_sequences holds 26", "0 .. 25"]),
        ({"top_p": "0.9"}, ["top_p='0.9'", "must be a number"]),
        ({"min_p": [[0.1]]}, ["min_p[0]=[0.1]", "must be a number"]),
        ({"top_k": True}, ["top_k=True", "whole number"]),
        ({"n": "2"}, ["n='2'", "whole number"]),
        ({"control": None}, ["control=None", "'best'", "'fixed:g'"]),
        ({"control": 4}, ["control=4", "'fixed:g'"]),
        ({"control": "fixed:²"}, ["control='fixed:²'", "'fixed:g'"]),
        ({"drafter": None}, ["drafter=None", "DrafterConfig"]),
        ({"accept": None}, ["accept=None", "'coupled'"]),
        ({"logprobs": ["raw"]}, ["logprobs=['raw']", "'raw'"]),
    ],
)
def test_arguments_of_the_wrong_type(
    refused: Refused, arguments: dict[str, Any], parts: list[str]
) -> None:
    refused(parts, **arguments)


def test_results_that_cannot_fit_on_the_host(refused: Refused) -> None:
    refused(
        ["n=2147483647", "max_new_tokens=4", "GB of results", "several calls"],
        n=2**31 - 1,
    )


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = er_jax.RolloutConfig(
        max_new_tokens=np.int64(4),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int32(3),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        gammas=[np.int64(0), 2],  # type: ignore[arg-type]
        banned_ids=np.array([1, 2]),  # type: ignore[arg-type]
        logit_bias={np.int64(7): np.float32(0.5)},  # type: ignore[dict-item]
        stop_sequences=np.array([[1, 2]]),  # type: ignore[arg-type]
    )
    assert type(config.max_new_tokens) is type(config.top_k) is int
    assert type(config.temperature) is type(config.top_p) is float
    assert config.stop_token_ids == (3, 4)
    assert config.gammas == (0, 2)
    assert config.logit_bias == ((7, 0.5),)
    assert config.stop_sequences == ((1, 2),)
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"skip": "norm"}, ["skip='norm'", "skip=('norm',)"]),
        ({"skip": ("norm", "")}, ["skip=('norm', '')", "empty"]),
        ({"skip": (1,)}, ["skip=(1,)"]),
        ({"bits": 8.0}, ["bits=8.0", "8 or 4"]),
        ({"bits": "8"}, ["bits='8'", "8 or 4"]),
        ({"group_size": 64.0}, ["group_size=64.0", "whole number"]),
        ({"group_size": True}, ["group_size=True", "whole number"]),
        ({"act_bits": 8.0}, ["act_bits=8.0", "'auto'"]),
    ],
)
def test_drafters_of_the_wrong_type(
    arguments: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        DrafterConfig(**arguments)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_list_of_words_to_skip_does() -> None:
    assert DrafterConfig(skip=["norm"]).skip == ("norm",)  # type: ignore[arg-type]


# The policy.


def test_no_policy(refused: Refused) -> None:
    _, params = fresh()
    refused(["policy=26", "no vocab_size", "any-policy"], model=(26, params))


def test_a_policy_that_cannot_be_hashed(refused: Refused) -> None:
    @dataclasses.dataclass
    class Unhashable:
        inner: er_jax.Decoder

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    policy, params = fresh()
    refused(
        ["policy=", "cannot be hashed", "frozen dataclass"],
        model=(Unhashable(policy), params),
    )


def test_logits_narrower_than_float32(refused: Refused) -> None:
    @dataclasses.dataclass(frozen=True)
    class Narrow:
        inner: er_jax.Decoder

        def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
            return self.inner.logits(params, hidden).astype("bfloat16")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    policy, params = fresh()
    refused(
        ["policy.logits", "bfloat16", "float32 or wider"],
        model=(Narrow(policy), params),
    )


# Where parameters lie.


@pytest.mark.parametrize("part", ["policy", "draft"])
def test_parameters_on_another_device(refused: Refused, part: str) -> None:
    policy, params = fresh()
    policy_and_draft = er_jax.attach_draft(params, DrafterConfig())
    moved = jax.device_put(getattr(policy_and_draft, part), jax.devices()[3])
    policy_and_draft = dataclasses.replace(policy_and_draft, **{part: moved})
    refused(
        ["params: ", f"lies on {jax.devices()[3]}", f"runs on {jax.devices()[0]}",
         "jax.device_put", "jax.default_device"],
        model=(policy, policy_and_draft), control="fixed:2",
    )  # fmt: skip


def test_parameters_that_were_donated(refused: Refused) -> None:
    policy, params = fresh()
    params = jax.device_put(params)
    params["final_norm"].delete()
    refused(
        ["params: final_norm was deleted", "donated", "that the update returned"],
        model=(policy, params),
    )


def test_parameters_of_a_mesh_without_the_mesh(refused: Refused) -> None:
    policy, params = fresh()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, everywhere)
    refused(
        ["params: ", "laid out over 2 devices", "NamedSharding", "give mesh=",
         "jax.device_put"],
        model=(policy, params),
    )  # fmt: skip


def test_parameters_run_where_the_default_device_is() -> None:
    """One engine for each device: programs of one cannot run on another."""
    policy, params = unused()
    wanted = rollout(policy, params)
    device = jax.devices()[2]
    moved = jax.device_put(params, device)
    with jax.default_device(device):
        found = rollout(policy, moved)
    np.testing.assert_array_equal(found.completion_ids, wanted.completion_ids)
    with pytest.raises(ValueError, match=f"runs on {jax.devices()[0]}"):
        rollout(policy, moved)
    rollout(policy, jax.device_put(moved, jax.devices()[0]))


# Settings of the caller's.


def test_inside_jit(refused: Refused) -> None:
    policy, params = fresh()
    for traced, part in (("params", "params is traced"), ("key", "key is traced")):

        def inside(value: Any, traced: str = traced) -> Any:
            given = {"params": params, "key": KEY} | {traced: value}
            return rollout(policy, given["params"], key=given["key"]).completion_ids

        value = {"params": params, "key": KEY}[traced]
        with pytest.raises(ValueError, match=f"{part}.*cannot be part of jax.jit"):
            jax.jit(inside)(value)


def test_guards_and_disabled_jit_are_the_callers_own() -> None:
    """In the first call, which compiles, and in one that finds everything there."""
    policy, params = unused()
    params, key = jax.device_put(params), jax.random.key(5)
    for _ in range(2):
        with jax.transfer_guard("disallow"), jax.disable_jit():
            found = rollout(policy, params, key=key, control="fixed:2")
    wanted = rollout(policy, params, key=key, control="fixed:2")
    np.testing.assert_array_equal(found.completion_ids, wanted.completion_ids)


def test_who_does_not_draft_needs_no_draft() -> None:
    policy, params = unused()
    wanted = rollout(policy, params)
    found = rollout(policy, PolicyParams(params, None))
    np.testing.assert_array_equal(found.completion_ids, wanted.completion_ids)
