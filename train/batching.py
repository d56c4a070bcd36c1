"""Batches: sequences of many lengths as arrays of few shapes.

A training example is a prompt and the completion that follows it. Examples are sorted
into length buckets, and each bucket is cut into chunks of a fixed number of rows. The
shapes do not depend on the lengths, so few programs are compiled. Every chunk of every
bucket holds about the same number of tokens.

Left out: packing several examples into one row, which needs a policy that masks
attention between them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

# NumPy arrays on the host, JAX arrays inside a program.
Array = jax.Array | np.ndarray


@struct.dataclass
class Batch:
    """Examples of one bucket: R rows of T tokens, where token t predicts target t.

    Attributes:
      tokens: `[R, T]` int32, prompt and completion without the last token; 0 in
        padding.
      positions: `[R, T]` int32, counted from 0; -1 in padding.
      targets: `[R, T]` int32, the token that follows each of `tokens`; 0 in padding.
      mask: `[R, T]` float32, 1 where the target is a token that the policy has sampled
        or is to write, else 0.
      behavior_logprobs: `[R, T]` float32, log-probability of the target when it was
        sampled; 0 where masked.
      fresh: `[R, T]` float32, 1 where the target was sampled by the parameters from
        before the step, not by earlier ones; 0 where masked.
      advantages: `[R]` float32; 0 in supervised training.
    """

    tokens: Array
    positions: Array
    targets: Array
    mask: Array
    behavior_logprobs: Array
    fresh: Array
    advantages: Array

    # As a rollout has them, for `er_jax.score`: the first token is the prompt, and of
    # what follows only completion tokens are scored.

    @property
    def prompt_ids(self) -> Array:
        """`[R, 1]` int32."""
        return self.tokens[:, :1]

    @property
    def prompt_mask(self) -> Array:
        """`[R, 1]` bool."""
        return self.positions[:, :1] >= 0

    @property
    def completion_ids(self) -> Array:
        """`[R, T]` int32."""
        return self.targets

    @property
    def completion_mask(self) -> Array:
        """`[R, T]` bool."""
        return self.mask > 0

    @property
    def lengths(self) -> Array:
        """`[R]`, tokens after the first."""
        return (self.positions >= 0).sum(axis=1)


@struct.dataclass
class Chunks:
    """All examples of one bucket, cut into C chunks of one shape.

    Attributes:
      batch: a `Batch` whose leaves have a leading axis C.
      num_chunks: int32 `[]`, chunks in use; the others are padding.
    """

    batch: Batch
    num_chunks: Array


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and completion on the host.

    Attributes:
      prompt: token ids, at least one.
      completion: token ids, at least one; an end token is the last.
      behavior_logprobs: one per completion token; None in supervised training.
      fresh: whether the parameters from before the step sampled each of them; None if
        all.
      sampled: whether the policy sampled each of them and no tool appended it; None if
        all.
      advantage: of the whole completion.
    """

    prompt: Sequence[int]
    completion: Sequence[int] | np.ndarray
    behavior_logprobs: Sequence[float] | np.ndarray | None = None
    advantage: float = 0.0
    fresh: np.ndarray | None = None
    sampled: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Positions that the example takes; its last token is a target only."""
        return len(self.prompt) + len(self.completion) - 1


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that batches may have.

    Attributes:
      lengths: tokens, ascending; an example goes to the first bucket that holds it.
      tokens: tokens in one chunk. A bucket of length T has tokens // T rows, rounded
        down to a multiple of `row_groups`, and at least `row_groups`.
      row_groups: parts of a mesh that the rows are spread over.
    A bucket longer than `tokens` takes part in a step only if an example of the step
    needs it or a longer one: the longest line of a file costs nothing in the steps that
    do not sample it.

    Raises:
      ValueError: lengths not ascending from >= 1, or tokens < 1.
    """

    lengths: tuple[int, ...]
    tokens: int
    row_groups: int = 1

    def __post_init__(self):
        if (
            not self.lengths
            or list(self.lengths) != sorted({*self.lengths})
            or self.lengths[0] < 1
        ):
            raise ValueError(
                f"lengths={self.lengths}: give ascending lengths of at least 1 token"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a chunk has at least 1 token")

    def rows(self, length: int) -> int:
        """Return R, the rows of a chunk, for the bucket of `length`."""
        return max(1, self.tokens // length // self.row_groups) * self.row_groups

    def length_for(self, example: Example) -> int:
        """Return the length of an example's bucket; ValueError if none holds it."""
        for length in self.lengths:
            if example.length <= length:
                return length
        raise ValueError(
            f"an example of {example.length + 1} tokens does not fit the longest "
            f"bucket, {self.lengths[-1]}; shorten it or add a longer bucket"
        )

    def up_to(self, longest: int) -> "Buckets":
        """Return buckets of which the last holds `longest` tokens.

        Its length is `longest` rounded up to a multiple of 16. Between `tokens` and
        that length, bucket lengths double: such examples are few, and their padding is
        expensive.
        """
        last = -(-longest // 16) * 16
        lengths = [length for length in self.lengths if length < last]
        step = self.tokens // 16 * 16
        while 0 < step < last:
            if step > max(lengths, default=0):
                lengths.append(step)
            step *= 2
        return dataclasses.replace(self, lengths=(*lengths, last))


def batch_of(examples: Sequence[Example], rows: int, length: int) -> Batch:
    """Pad examples into one batch of `[rows, length]`; rows past the last are empty."""
    batch = empty_batch(rows, length)
    for row, example in enumerate(examples):
        sequence = np.asarray([*example.prompt, *example.completion], np.int32)
        # The last prompt token predicts the first completion token.
        first = len(example.prompt) - 1
        used = example.length
        batch.tokens[row, :used] = sequence[:-1]
        batch.positions[row, :used] = np.arange(used)
        batch.targets[row, :used] = sequence[1:]
        batch.mask[row, first:used] = 1 if example.sampled is None else example.sampled
        fresh = 1 if example.fresh is None else example.fresh
        batch.fresh[row, first:used] = batch.mask[row, first:used] * fresh
        if example.behavior_logprobs is not None:
            batch.behavior_logprobs[row, first:used] = example.behavior_logprobs
        batch.advantages[row] = example.advantage
    return batch


def empty_batch(rows: int, length: int) -> Batch:
    """Return a batch of nothing but padding, as writable NumPy arrays."""
    shape = (rows, length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        positions=np.full(shape, -1, np.int32),
        targets=np.zeros(shape, np.int32),
        mask=np.zeros(shape, np.float32),
        behavior_logprobs=np.zeros(shape, np.float32),
        fresh=np.zeros(shape, np.float32),
        advantages=np.zeros(rows, np.float32),
    )


def make_batches(examples: Sequence[Example], buckets: Buckets) -> list[Batch]:
    """Sort examples into buckets, cut each into full-sized batches, keep the order."""
    groups: dict[int, list[Example]] = {length: [] for length in buckets.lengths}
    for example in examples:
        groups[buckets.length_for(example)].append(example)
    batches = []
    for length, group in groups.items():
        rows = buckets.rows(length)
        batches += [
            batch_of(group[i : i + rows], rows, length)
            for i in range(0, len(group), rows)
        ]
    return batches


def stack_chunks(
    examples: Sequence[Example], buckets: Buckets, capacity: int
) -> tuple[Chunks, ...]:
    """Sort the examples of a step into chunks of fixed shapes.

    The shapes depend on `capacity` and not on the lengths of the examples, except that
    buckets longer than `buckets.tokens` are left out where no example needs them.

    Args:
      examples: at most `capacity` of them.
      buckets: shapes of the chunks.
      capacity: the number of examples that each bucket has room for.
    Returns:
      One `Chunks` for each bucket.
    """
    longest = max(map(buckets.length_for, examples), default=0)
    most = max(longest, buckets.tokens, buckets.lengths[0])
    buckets = dataclasses.replace(
        buckets, lengths=tuple(length for length in buckets.lengths if length <= most)
    )
    batches = make_batches(examples, buckets)
    stacked = []
    for length in buckets.lengths:
        rows = buckets.rows(length)
        own = [batch for batch in batches if batch.tokens.shape[1] == length]
        empty = empty_batch(rows, length)
        padded = own + [empty] * (-(-capacity // rows) - len(own))
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
        stacked.append(Chunks(batch=batch, num_chunks=np.asarray(len(own), np.int32)))
    return tuple(stacked)
