"""Sessions: programs and prompts that calls share, freed when the session is closed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import numpy as np
import pytest

import er_jax
from er_jax import Rollout, Session
from er_jax.engine import kept
from tests.small import small_policy
from tests.test_threads import together

pytestmark = pytest.mark.usefixtures("unoptimized_module")

POLICY = small_policy("session")
PROMPTS = [[1, 2, 3], [4, 5]]
CONFIG = er_jax.RolloutConfig(max_new_tokens=6, n=2, control="fixed:2", max_slots=4)


def sample(session: Session | None, seed: int = 0, **named: Any) -> Rollout:
    named = {"params": POLICY.init(jax.random.key(seed)), "config": CONFIG} | named
    named = {"prompts": PROMPTS, "key": jax.random.key(1)} | named
    return er_jax.rollout(POLICY, session=session, **named)


def assert_same(found: Rollout, wanted: Rollout) -> None:
    """To the bit, log-probabilities as well."""
    for name in ("completion_ids", "logprobs", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


# What a session owns.


def test_calls_of_a_session_share_programs_with_nothing_else() -> None:
    kept.forget_engines()
    with Session() as session:
        first, again = sample(session), sample(session, seed=3)
        assert first.stats.compiled != [] and again.stats.compiled == []
        assert kept._kept.all() == []
        (engine,) = session.engines.all()
        assert session.controller in engine.defaults.values()
        assert f"{len(engine.compiled)} programs" in session.summary()
        with er_jax.stream(
            POLICY, POLICY.init(jax.random.key(0)), PROMPTS, key=jax.random.key(1),
            config=CONFIG, session=session,
        ) as items:  # fmt: skip
            assert len(list(items)) == 4
        assert items.rollout.stats.compiled == []
        found = together(*(lambda: sample(session) for _ in range(2)))
        assert all(out.stats.compiled == [] for out in found)
    plain = sample(None)
    assert len(kept._kept.all()) == 1
    for out in (first, items.rollout, *found):
        assert_same(out, plain)


def test_a_closed_session_has_freed_everything() -> None:
    client = jax.devices()[0].client

    def living() -> tuple[int, int]:
        gc.collect()
        return len(client.live_executables()), len(jax.live_arrays())

    params = POLICY.init(jax.random.key(0))
    with Session() as session:  # what JAX keeps of any call
        sample(session, params=params)
    before = living()
    session = Session()
    sample(session, params=params)
    engine = weakref.ref(session.engines.all()[0])
    controller = weakref.ref(session.controller)
    assert living()[0] > before[0]
    session.close()
    session.close()
    after = living()
    assert after[0] <= before[0] and after[1] <= before[1]
    assert engine() is None and controller() is None
    assert "closed" in session.summary()


def test_a_session_that_is_none_or_closed_is_refused() -> None:
    with Session() as session:
        pass
    with pytest.raises(ValueError, match="session is closed"):
        sample(session)
    with pytest.raises(ValueError, match=r"must be an er_jax\.Session"):
        sample("session")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="session is closed"):
        er_jax.compile_ahead(
            POLICY, POLICY.init(jax.random.key(0)), PROMPTS, config=CONFIG,
            session=session,
        )  # fmt: skip
