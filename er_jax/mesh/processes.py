"""The agreement of several processes: small reductions over their devices.

The leader's measurements are sent to all processes before any decision depends on them.
A failure of one process is raised in all, so that none waits forever. All processes
must call the same methods in the same order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from er_jax.engine.protocol import TokenBuffers

# Bytes are padded to a multiple of this many, so that few programs are compiled.
BLOCK_BYTES = 1 << 14

# Of more, so many are sent at a time: each takes its place on every device.
MOST_BYTES = 1 << 26


class Processes:
    """The processes whose devices are on a mesh; see `engine.protocol.Agreement`.

    Args:
      mesh: any mesh; `of_all` takes all devices there are.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._devices: list[Any] = list(mesh.devices.flat)
        indices = [device.process_index for device in self._devices]
        self._ranks = sorted(set(indices))
        self.is_spread = len(self._ranks) > 1
        self.is_leader = not self.is_spread or indices[0] == jax.process_index()

    @classmethod
    def of_all(cls) -> Processes:
        """Return all the processes there are."""
        return cls(Mesh(np.array(jax.devices()), ("devices",)))

    def sync_or_raise(
        self, values: Any, failure: Exception | None = None
    ) -> tuple[np.ndarray, Exception | None]:
        """Return the leader's numbers, and the failure that this process must raise."""
        if not self.is_spread:
            return np.asarray(values, np.float64), failure
        # The process that has failed, counted from 1; the last one if several have.
        failed = 0 if failure is None else 1 + jax.process_index()
        own = np.append(np.asarray(values, np.float32), np.float32(failed))
        found = self._reduce(_first_and_any, [own] * len(self._devices))
        if found[-1] and failure is None:
            failure = RuntimeError(
                f"another process has failed, process {int(found[-1]) - 1}; its own "
                "error says why"
            )
        return found[:-1], failure

    def broadcast_from_leader(self, values: Any) -> np.ndarray:
        """Return the leader's numbers, in every process."""
        return self.sync_or_raise(values)[0]

    def broadcast_bytes(self, data: bytes | None) -> bytes | None:
        """Return the leader's bytes, in every process; None if it has none."""
        if not self.is_spread:
            return data
        own = data if self.is_leader else None
        # One more than their number, so that none are told from nothing.
        told = 0 if own is None else len(own) + 1
        (size,) = self.sum(np.array([told], np.int32))
        if size == 0:
            return None
        blocks = np.zeros(-(-int(size) // BLOCK_BYTES) * BLOCK_BYTES, np.uint8)
        if own is not None:
            blocks[: len(own)] = np.frombuffer(own, np.uint8)
        # As int32: every transport can add these.
        return self.sum(blocks.view(np.int32)).tobytes()[: size - 1]

    def broadcast_text(self, text: str | None) -> str | None:
        """Return the leader's text, in every process; None if it has none."""
        found = self.broadcast_bytes(None if text is None else text.encode())
        return None if found is None else found.decode()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._ranks)

    @property
    def rank(self) -> int:
        """The place of this process among them, from 0."""
        return self._ranks.index(jax.process_index())

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes that each process gives, in every process."""
        if not self.is_spread:
            return [data]
        sizes = np.zeros(self.count, np.int32)
        sizes[self.rank] = len(data)
        sizes = self.sum(sizes)
        ends = np.cumsum(sizes.astype(np.int64)).tolist()
        start, parts = ends[self.rank] - len(data), []
        for begin in range(0, ends[-1], MOST_BYTES):
            count = min(MOST_BYTES, ends[-1] - begin)
            blocks = np.zeros(-(-count // BLOCK_BYTES) * BLOCK_BYTES, np.uint8)
            own = data[max(begin - start, 0) : max(begin + count - start, 0)]
            place = max(start - begin, 0)
            blocks[place : place + len(own)] = np.frombuffer(own, np.uint8)
            parts.append(self.sum(blocks.view(np.int32)).tobytes()[:count])
        whole = b"".join(parts)
        return [
            whole[end - size : end]
            for end, size in zip(ends, sizes.tolist(), strict=True)
        ]

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Return the sum of all processes' arrays, in every process."""
        if not self.is_spread:
            return own
        here = [d.process_index == jax.process_index() for d in self._devices]
        # One device of this process has the array, its others have zeros.
        parts = [np.zeros_like(own)] * len(here)
        parts[here.index(True)] = own
        return self._reduce(_add, parts)

    def _reduce(self, function: Any, parts: list[np.ndarray]) -> np.ndarray:
        """Return `function` of `[devices, ...]`; parts: the array of each device."""
        every = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))

        def part(index: Any) -> np.ndarray:
            return parts[index[0].start or 0][None]

        shape = (len(parts), *parts[0].shape)
        spread = jax.make_array_from_callback(shape, every, part)
        return np.asarray(_reduction(function, self._mesh)(spread))


def _first_and_any(parts: jax.Array) -> jax.Array:
    return jnp.append(parts[0, :-1], jnp.max(parts[:, -1]))


def _add(parts: jax.Array) -> jax.Array:
    return jnp.sum(parts, axis=0, dtype=parts.dtype)


@functools.lru_cache(maxsize=64)
def _reduction(function: Any, mesh: Mesh) -> Any:
    """Return the jitted reduction, with its result on every device."""
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))


def fetch_rows(
    buffers: TokenBuffers, rows: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return tokens and log-probabilities, `[S]` each, of this process's rows.

    Every row is returned by the first process that holds it. The arrays may be views of
    the device's buffers: copy what is to be kept.
    """
    tokens = buffers[0]
    first: dict[int, int] = {}
    held: Any = tokens.sharding.devices_indices_map(tokens.shape)
    for device, (part, *_) in held.items():
        start = part.start or 0
        first[start] = min(device.process_index, first.get(start, device.process_index))
    found = {}
    token_parts, logprob_parts = (
        {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        for x in buffers
    )
    for start, part in token_parts.items():
        own = [row for row in rows.tolist() if start <= row < start + len(part)]
        if own and first[start] == jax.process_index():
            pieces = jax.device_get((part, logprob_parts[start]))
            for row in own:
                found[row] = tuple(piece[row - start] for piece in pieces)
    return found  # type: ignore[return-value]
