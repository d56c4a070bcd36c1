"""The programs that can run the batch now, and the compilation that each needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from er_jax.request import Request
from er_jax.scheduler.admission import Rows
from er_jax.scheduler.topology import Shape, Topology
from er_jax.types import Program, Sampling


class Options:
    """The programs that a rollout's batch may run.

    Args:
      topology: the devices. request: its sizes. settings: of sampling, on the host.
    """

    def __init__(
        self, topology: Topology, request: Request, settings: Sampling
    ) -> None:
        self._topology, self._request = topology, request
        self._settings = settings
        self._compiled: set[Program] = set()

    def reach(self, shape: Shape, gamma: int) -> int:
        """Return the most tokens that a row can grow by before a window can end."""
        return self._topology.engine_of(shape[2]).rounds_per_test * (gamma + 1)

    def programs(
        self,
        rows: Rows,
        shape: Shape,
        is_waiting: bool,
        gammas: Sequence[int],
        *,
        num_open: int = 0,
        start_length: int | None = None,
    ) -> list[Program]:
        """Return the programs that can run the live rows now, the safest one last.

        The last has the shortest drafts, the most rows and the longest cache, and its
        drafts are the first ones, which see all positions if they may. They also do
        where there is no room for rings. While sequences wait, the batch keeps all its
        slots. A smaller batch grows only to programs that are compiled, or to all
        slots. The cache is shortened only if the live rows leave a quarter of the new
        one free, so that it does not grow again at once.

        Args:
          rows: the batch. shape: of its state. is_waiting: whether sequences wait for
            free rows. gammas: draft lengths to choose from.
          num_open: sequences that are not live and will need rows; rows are kept for
            them, because moving to fewer and back costs more than they do.
          start_length: positions that a row to be started needs; None is the bucket of
            the prompts while sequences wait.
        """
        slots = self._request.slots
        num_live = min(slots, rows.num_live + num_open)
        sizes = {s: self._topology.row_buckets(s) for s in self._topology.sharings}
        if self._request.turns is not None:
            sizes.pop(True, None)  # Rows may start at any time, in data shards.
        if is_waiting:
            sizes = {False: (slots,)}
        prompts = start_length
        if prompts is None:
            prompts = self._request.prompt_bucket if is_waiting else 1
        shapes = [
            (count, length, shared)
            for shared in sorted(sizes, reverse=True)
            for count, length in itertools.product(
                sizes[shared], self._request.cache_lengths
            )
            if count >= num_live and self._fits(shape, (count, length, shared), rows)
        ]
        found: list[Program] = []
        for gamma in sorted(gammas, reverse=True):
            least = max(rows.needed_length(self.reach(shape, gamma)), prompts)
            for count, length, shared in shapes:
                is_shorter = length < shape[1]
                if (least + length // 4 if is_shorter else least) > length:
                    continue
                for view in self._request.views_at(length, gamma):
                    program = Program(count, length, gamma, shared).drafting(view)
                    if not self._have_rings_room(program):
                        program = program.seeing(None)
                    is_larger = len(rows) < count < slots
                    if is_larger and not self.is_compiled(program):
                        continue
                    if program not in found[-len(self._request.views) :]:
                        found.append(program)
        return found

    def _fits(self, old: Shape, new: Shape, rows: Rows) -> bool:
        """Whether memory allows to move to a shape, and to grow again from it."""
        limit = self._request.state_limit_bytes
        if limit is None or new == old:
            return True
        topology = self._topology
        free_bytes = limit - topology.weight_bytes(new[2])
        longest = (new[0], self._request.cache_lengths[-1], new[2])
        stops = [old, *topology.route(old, new, rows.num_live), longest]
        # During a move both states exist.
        return all(
            sum(map(topology.state_bytes, {*move})) <= free_bytes
            for move in itertools.pairwise(stops)
        )

    def _have_rings_room(self, program: Program) -> bool:
        """Whether memory allows a program's rings, beside its state."""
        limit, rows = self._request.state_limit_bytes, program.rows
        if limit is None or not program.window:
            return True
        rings = (rows, program.draft_length, program.shared_rows)
        sizes = map(self._topology.state_bytes, (program.shape, rings))
        return sum(sizes) + self._topology.weight_bytes(program.shared_rows) <= limit

    def is_compiled(self, program: Program) -> bool:
        """Whether a program's window is compiled."""
        if program not in self._compiled:
            shared = program.shared_rows
            engine, kind = (
                self._topology.engine_of(shared),
                self._topology.draft_kind(shared, program.draft),
            )
            if not engine.has_window(program, kind, self._settings):
                return False
            self._compiled.add(program)  # It stays compiled, and is asked for often.
        return True

    def window_compile_s(self, program: Program) -> float:
        """Return the expected seconds to compile its window, 0 if it is compiled."""
        if self.is_compiled(program):
            return 0.0
        engine = self._topology.engine_of(program.shared_rows)
        return engine.expected_compile_s("window")

    def compile_s(self, program: Program, shape: Shape, num_live: int) -> float:
        """Return the expected compile seconds until a batch can run a program.

        Args:
          program: to run. shape: of the batch's state. num_live: its live rows.
        """
        stops = [shape, *self._topology.route(shape, program.shape, num_live)]
        moves_s = (
            self._topology.move_compile_s(old, new)
            for old, new in itertools.pairwise(stops)
        )
        return self.window_compile_s(program) + sum(moves_s)
