"""The published cost model: a pass is bound by bytes or by arithmetic.

Source: the three equations, EfficientRollout (arXiv 2606.18967), section 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from er_jax.costs.passes import Kind, Reading, seconds_of_passes
from er_jax.costs.record import checked_real, damaged, load_record, save_record
from er_jax.types import Program


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The published cost model: a pass is bound by bytes or by arithmetic.

    Its parameters are seconds (bytes over bandwidth, operations over throughput), so
    neither device nor model needs to be known. With B rows of S positions and n
    positions per row (1, or gamma + 1 in a verification):

        pass = max(weights + cache B S, n B (dense + attention S)) + overhead B

    target_weights_s, draft_weights_s: to read the weights once.
    cache_s: to read one position of one row. dense_s: for the products of one position
      with the weights. attention_s: for the attention of one position to another.
    target_overhead_s, draft_overhead_s, verify_overhead_s: per row and pass.
    """

    target_weights_s: float
    draft_weights_s: float
    cache_s: float
    dense_s: float
    attention_s: float
    target_overhead_s: float
    draft_overhead_s: float
    verify_overhead_s: float

    @classmethod
    def fit(cls, readings: Sequence[Reading]) -> Roofline:
        """Fit to readings by relative errors, with less weight on outliers.

        Starting points and bounds come from the readings themselves.

        Args:
          readings: target passes, and either drafts and verifications or rounds.
        """
        from scipy import optimize

        kinds = np.array([reading.kind for reading in readings])
        rows = np.array([reading.rows for reading in readings], float)
        length = np.array([reading.length for reading in readings], float)
        gamma = np.array([reading.gamma for reading in readings], float)
        seconds = np.array([reading.seconds for reading in readings])
        weight = np.sqrt([reading.weight for reading in readings])
        is_target, is_draft = kinds == "target", kinds == "draft"
        # Draft passes in a reading, and the positions of its target pass.
        num_drafts = np.select([is_draft, kinds == "round"], [1.0, gamma], 0.0)
        positions = np.where(is_target | is_draft, 1.0, gamma + 1)

        fastest = seconds[is_target].min()
        fastest_draft = seconds[is_draft].min() if is_draft.any() else fastest / 2
        work = (positions * rows).max()
        dense = seconds[positions * rows == work].min() / work
        cache = np.ptp(seconds[is_target]) / (rows * length).max()
        least = 1e-6 * fastest / work
        start = np.array(
            [0.9 * fastest, 0.9 * fastest_draft, cache, dense, dense / 1e4]
            + [fastest / 100] * 3
        )
        start = np.maximum(start, least)

        def error(log_values: np.ndarray) -> np.ndarray:
            weights, draft, cache, dense, attention, *over = np.exp(log_values)
            one = rows * (dense + attention * length)
            drafted = np.maximum(draft + cache * rows * length, one) + over[1] * rows
            verified = np.maximum(weights + cache * rows * length, positions * one)
            verified += np.where(is_target, over[0], over[2]) * rows
            predicted = num_drafts * drafted + ~is_draft * verified
            return weight * np.log(predicted / seconds)

        bounds = (np.full(8, np.log(least) - 20), np.full(8, np.log(seconds.max()) + 1))
        best = None
        # The maximum of two terms is not smooth; several starts find the right side.
        for dense_factor, overhead_factor in itertools.product((0.3, 1.0), (0.1, 1.0)):
            factors = np.array([1, 1, 1, dense_factor, 1] + [overhead_factor] * 3)
            found = optimize.least_squares(
                error,
                np.log(start * factors),
                bounds=bounds,
                loss="soft_l1",
                f_scale=0.03,
            )
            if best is None or found.cost < best.cost:
                best = found
        assert best is not None
        return cls(*np.exp(best.x).tolist())

    def pass_seconds(self, kind: Kind, rows: int, length: int, gamma: int = 0) -> float:
        """Return the seconds of one pass; arguments as in `PassCosts.pass_seconds`."""
        if kind == "round":
            return self.round_seconds(Program(rows, length, gamma))
        weights, overhead, positions = {
            "target": (self.target_weights_s, self.target_overhead_s, 1),
            "draft": (self.draft_weights_s, self.draft_overhead_s, 1),
            "verify": (self.target_weights_s, self.verify_overhead_s, gamma + 1),
        }[kind]
        read = weights + self.cache_s * rows * length
        computed = positions * rows * (self.dense_s + self.attention_s * length)
        return max(read, computed) + overhead * rows

    def round_seconds(self, program: Program) -> float:
        """Return the seconds of a whole round, drafts and verification."""
        return seconds_of_passes(self, program)

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str]) -> None:
        """Write the model as JSON, with its conditions; see `save_record`."""
        save_record(path, "roofline", about, dataclasses.asdict(self))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], about: Mapping[str, str] | None = None
    ) -> Roofline:
        """Return the model that `save` wrote; errors as in `load_record`."""
        values = load_record(path, "roofline", about)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(
                f"{path} is damaged: a roofline must have {', '.join(names)}; measure "
                "it again"
            )
        with damaged(path):
            return cls(**{name: checked_real(name, values[name]) for name in names})
