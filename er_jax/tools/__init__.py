"""The command `er-jax`, and what it does: calibrate, sweep, replay, plan, rollout."""
