"""Which engines are kept between calls: what one call needs is kept as one."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import er_jax
from er_jax.engine import kept
from er_jax.engine.engine import Engine
from tests.small import small_policy
from tests.test_programs import CompileCounter

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.fixture(autouse=True)
def room_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_ENGINES", 1)
    kept.forget_engines()


def engines(policy: er_jax.Policy, *names: str) -> list[Engine]:
    """Engines of a call that needs one for each of these names."""
    return kept.kept_engines({n: lambda: Engine(policy, "coupled") for n in names})


def test_more_replicas_than_engines_are_kept_compile_once(
    compile_counter: CompileCounter,
) -> None:
    policy = small_policy("engine cache")
    params = policy.init(jax.random.key(0))

    def sample(**options: Any) -> er_jax.Rollout:
        return er_jax.rollout_replicas(
            policy, params, [[1, 2], [3]], key=jax.random.key(1),
            config=er_jax.RolloutConfig(max_new_tokens=4, control="ar"),
            mesh=Mesh(np.array(jax.devices()[:2]), ("data",)), **options,
        )  # fmt: skip

    first = sample()
    assert len(first.stats.compiled) == 8
    with compile_counter() as compiled:
        again = sample()
    assert again.stats.compiled == []
    assert compiled.count == 0, compiled
    assert again.completion_ids.tolist() == first.completion_ids.tolist()


def test_what_a_call_needs_is_kept_together_and_dropped_together() -> None:
    policy = small_policy("engines")
    first = engines(policy, "a", "bb", "ccc")
    assert len(set(first)) == 3
    # Asked for alone, as by a replica's own rollout, one still belongs to the others.
    assert engines(policy, "bb") == first[1:2]
    gone = [weakref.ref(one) for one in first]
    del first
    assert all(ref() for ref in gone)
    engines(policy, "dddd")
    assert not any(ref() for ref in gone)


def test_another_partition_takes_over_what_both_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "MAX_ENGINES", 2)
    policy = small_policy("engines")

    def get(*names: str) -> list[weakref.ref[Engine]]:
        found = engines(policy, *names)
        return [weakref.ref(one) for one in found]

    whole, half = get("a", "bb")
    same, quarter = get("a", "ccc")
    assert same() is whole() is not None
    get("dddd")
    assert half() is None and whole() and quarter()


def test_an_engine_in_use_is_found_again_and_not_made_twice() -> None:
    policy = small_policy("engines")
    (held,) = engines(policy, "a")
    engines(policy, "bb")  # there is room for one
    assert engines(policy, "a") == [held]
    # Forgotten, it is nobody's but its holder's.
    kept.forget_engines()
    assert engines(policy, "a") != [held]
