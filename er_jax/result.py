"""The result of a rollout, and the error that carries the finished completions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from er_jax.config import RolloutConfig
from er_jax.engine.protocol import Agreement
from er_jax.request import Request
from er_jax.stats import RolloutStats
from er_jax.types import FINISH_NAMES, NONE, Finish


def _no_stats() -> Any:
    """Return None: what `rollout` returns has stats, pytrees are made without."""
    return None


def _all_sampled() -> Any:
    """Return None, in whose place `Completion` puts a mask of all of its tokens."""
    return None


Spans: TypeAlias = tuple[tuple[int, int], ...]


def spans_of(mask: np.ndarray) -> Spans:
    """Return where flags `[length]` are set, as (start, end) of each run of them."""
    padded = np.concatenate([[0], np.asarray(mask, np.int8), [0]])
    edges = np.flatnonzero(np.diff(padded)).reshape(-1, 2)
    return tuple((int(start), int(end)) for start, end in edges)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of a request, N = len(prompts) * n in prompt order.

    The n completions of a prompt are adjacent. A rollout is a pytree of its arrays, all
    with N in front: `jax.tree.map(lambda a: a[:8], out)` is a rollout of its first
    eight rows, and `jax.jit` and `jax.device_put` take and return one. `stats` tells of
    a whole call and stays behind: it is None in what such a function returns.

    With T the longest prompt:

    Attributes:
      prompt_ids: int32 `[N, T]`, left-padded.
      prompt_mask: bool `[N, T]`, true on the prompt's tokens.
      completion_ids: int32 `[N, max_new_tokens]`, right-padded, the stop token
        included; of a conversation all turns, with what was appended between them.
      completion_mask: bool `[N, max_new_tokens]`, true on sampled tokens.
      logprobs: float32 `[N, max_new_tokens]`, log-probabilities of the sampled tokens
        under the target, of the kind `config.logprobs`; 0 where masked, appended
        tokens included.
      lengths: int32 `[N]`, tokens of each completion, appended ones included.
      finish: int32 `[N]`, why each completion ended, a `types.Finish`; `finish_reason`
        has the names.
      version: int32 `[N, max_new_tokens]`, the argument `version` of the call that
        sampled each token; -1 where masked.
      sequence_ids: int32 `[N]`, the ids that select each completion's noise.
      stats: what the rollout did; see `RolloutStats`.
    """

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finish: np.ndarray
    version: np.ndarray
    sequence_ids: np.ndarray
    stats: RolloutStats = dataclasses.field(default_factory=_no_stats)

    @functools.cached_property
    def finish_reason(self) -> np.ndarray:
        """Strings `[N]`, not inside `jax.jit`: "stop", "length", "nonfinite", "tool"
        where a turn got no answer to go on with, or "unfinished" where the rollout
        ended early.
        """
        return np.array(FINISH_NAMES)[np.asarray(self.finish)]

    @functools.cached_property
    def turns(self) -> tuple[Spans, ...]:
        """The turns of each completion, not inside `jax.jit`: (start, end) of the
        tokens sampled in each, as indices of its line of `completion_ids`.

        They are the runs of `completion_mask`. Without `respond` there is one, or none
        where no token was sampled.
        """
        return tuple(spans_of(mask) for mask in np.asarray(self.completion_mask))

    def for_request(
        self, prompts: Sequence[Sequence[int]], sequence_ids: Sequence[int]
    ) -> Rollout:
        """Return what this rollout holds of another request, for its `resume`.

        So one call goes on with completions of earlier ones and begins new ones. Those
        whose sequence ids are not here have no token yet.

        Args:
          prompts: P sequences of token ids, those of the request.
          sequence_ids: N = P * n integers, those of the request; the n of a prompt are
            adjacent.
        Returns:
          A `Rollout` of N rows on the host, without statistics.
        Raises:
          ValueError: N is no multiple of P, or a completion that is here is of another
            prompt.
        Example:
          >>> import jax, er_jax
          >>> policy = er_jax.Decoder(er_jax.DecoderConfig(
          ...     vocab_size=32, dim=32, num_layers=1, num_heads=2, num_kv_heads=1,
          ...     hidden_dim=64))
          >>> config = er_jax.RolloutConfig(max_new_tokens=4, n=1, control="ar")
          >>> key, params = jax.random.key(1), policy.init(jax.random.key(0))
          >>> out = er_jax.rollout(
          ...     policy, params, [[1], [2]], key=key, config=config)
          >>> begun = out.for_request([[2], [3]], [1, 2])
          >>> begun.lengths
          array([4, 0], dtype=int32)
          >>> out = er_jax.rollout(
          ...     policy, params, [[2], [3]], key=key, config=config,
          ...     sequence_ids=[1, 2], resume=begun)
        """
        own = jax.tree.map(np.asarray, self)
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        ids = np.asarray(sequence_ids, np.int32)
        if not arrays or not len(ids) or len(ids) % len(arrays):
            raise ValueError(
                f"sequence_ids has {len(ids)} for {len(arrays)} prompts; give n for "
                "each prompt"
            )
        n = len(ids) // len(arrays)
        row_of = {name: row for row, name in enumerate(own.sequence_ids.tolist())}
        rows = [row_of.get(name, NONE) for name in ids.tolist()]
        for to, row in enumerate(rows):
            if row == NONE:
                continue
            prompt = own.prompt_ids[row][own.prompt_mask[row]]
            if not np.array_equal(prompt, arrays[to // n]):
                raise ValueError(
                    f"prompts: {arrays[to // n].tolist()[:20]} is not the prompt that "
                    f"sequence id {ids[to]} has here; give the same one"
                )
        is_here = np.array(rows) != NONE

        def taken(array: np.ndarray, otherwise: int) -> np.ndarray:
            found = np.full((len(ids), *array.shape[1:]), otherwise, array.dtype)
            found[is_here] = array[np.array(rows)[is_here]]
            return found

        prompt_ids, prompt_mask = left_padded(arrays, n, 0)
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=taken(own.completion_ids, 0),
            completion_mask=taken(own.completion_mask, 0),
            logprobs=taken(own.logprobs, 0),
            lengths=taken(own.lengths, 0),
            finish=taken(own.finish, Finish.UNFINISHED),
            version=taken(own.version, NONE),
            sequence_ids=ids,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all but the statistics to a file of NumPy arrays (`.npz`).

        The file is written under another name and renamed when it is complete.
        """
        arrays = {name: getattr(self, name) for name in _array_names()}
        part = Path(f"{path}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rollout:
        """Return the rollout that `save` wrote, with empty statistics.

        Raises:
          ValueError: the file holds no rollout.
          OSError: it cannot be read.
        """
        try:
            # Opened here: NumPy leaves a damaged file open.
            with open(path, "rb") as stream, np.load(stream) as file:
                arrays = {name: file[name] for name in _array_names()}
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{os.fspath(path)} holds no rollout: {error}; give a file that "
                "Rollout.save wrote"
            ) from error
        return cls(**arrays, stats=RolloutStats())


jax.tree_util.register_dataclass(
    Rollout,
    data_fields=[f.name for f in dataclasses.fields(Rollout) if f.name != "stats"],
    meta_fields=[],
    drop_fields=["stats"],
)


def _array_names() -> list[str]:
    fields = dataclasses.fields(Rollout)
    return [field.name for field in fields if field.name != "stats"]


def left_padded(
    prompts: Sequence[np.ndarray], n: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask `[P * n, T]` of P prompts, each n times; see `Rollout`."""
    count, width = len(prompts) * n, max(len(p) for p in prompts)
    prompt_ids = np.full((count, width), pad_id, np.int32)
    prompt_mask = np.zeros((count, width), bool)
    for row in range(count):
        prompt = prompts[row // n]
        prompt_ids[row, width - len(prompt) :] = prompt
        prompt_mask[row, width - len(prompt) :] = True
    return prompt_ids, prompt_mask


def assemble(
    prompts: list[np.ndarray],
    completions: Mapping[int, Completion],
    sequence_ids: np.ndarray,
    config: RolloutConfig,
    stats: RolloutStats,
    agreement: Agreement,
    version: int = 0,
    earlier: Rollout | None = None,
) -> Rollout:
    """Lay completions out as a `Rollout`, the same in every process.

    Args:
      prompts: int32 `[length]` each. completions: sequence (0 .. N-1) -> completion; of
        several processes, each gives those it has.
      sequence_ids: int `[N]`. config: settings of the rollout. stats: passed through.
      agreement: of the processes.
      version: of the tokens that were sampled now. earlier: has those of the others.
    """
    count = len(sequence_ids)
    prompt_ids, prompt_mask = left_padded(prompts, config.n, config.pad_id)
    longest = config.most_new_tokens
    completion_ids = np.zeros((count, longest), np.int32)
    logprobs = np.zeros((count, longest), np.float32)
    lengths, reasons = np.zeros((2, count), np.int32)
    assert len(completions) == count or agreement.is_spread
    for row, completion in completions.items():
        length = len(completion.token_ids)
        ids = completion.token_ids
        # Below 0 those that were appended, so that one sum tells both.
        completion_ids[row, :length] = np.where(completion.mask, ids, ~ids)
        logprobs[row, :length] = completion.logprobs
        lengths[row] = length
        reasons[row] = FINISH_NAMES.index(completion.finish_reason)
    # Every process holds zeros where another one has the completion.
    completion_ids, logprobs, lengths, reasons = map(
        agreement.sum, (completion_ids, logprobs, lengths, reasons)
    )
    is_token = np.arange(longest)[None] < lengths[:, None]
    is_appended = completion_ids < 0
    completion_ids = np.where(is_appended, ~completion_ids, completion_ids)
    completion_ids = np.where(is_token, completion_ids, np.int32(config.pad_id))
    completion_mask = is_token & ~is_appended
    versions = np.where(completion_mask, np.int32(version), np.int32(NONE))
    if earlier is not None:
        known = min(longest, earlier.version.shape[1])
        old = earlier.version[:, :known]
        versions[:, :known] = np.where(old == NONE, versions[:, :known], old)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        logprobs=logprobs,
        lengths=lengths,
        finish=reasons,
        version=versions,
        sequence_ids=sequence_ids.astype(np.int32),
        stats=stats,
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sequence, finished unless the rollout ended early.

    Attributes:
      token_ids: int32 `[length]`, a stop token included.
      logprobs: float32 `[length]`, of these tokens, as in `Rollout`.
      finish_reason: "stop", "length", "nonfinite", "tool" or "unfinished".
      mask: bool `[length]`, true on sampled tokens, false on those that `respond`
        appended; all true if left out.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    mask: np.ndarray = dataclasses.field(default_factory=_all_sampled)

    def __post_init__(self) -> None:
        if self.mask is None:
            object.__setattr__(self, "mask", np.ones(len(self.token_ids), bool))

    @property
    def turns(self) -> Spans:
        """Start and end of the tokens sampled in each turn; see `Rollout.turns`."""
        return spans_of(self.mask)

    def copy(self) -> Completion:
        """Return a copy with its own arrays."""
        return dataclasses.replace(
            self,
            token_ids=self.token_ids.copy(),
            logprobs=self.logprobs.copy(),
            mask=self.mask.copy(),
        )

    def followed_by(self, later: Completion) -> Completion:
        """Return this completion with the tokens that were sampled later."""
        return Completion(
            token_ids=np.concatenate([self.token_ids, later.token_ids]),
            logprobs=np.concatenate([self.logprobs, later.logprobs]),
            finish_reason=later.finish_reason,
            mask=np.concatenate([self.mask, later.mask]),
        )

    def answered(self, token_ids: np.ndarray) -> Completion:
        """Return this completion with tokens appended that were not sampled."""
        return self.followed_by(
            Completion(
                token_ids=token_ids,
                logprobs=np.zeros(len(token_ids), np.float32),
                finish_reason=FINISH_NAMES[Finish.UNFINISHED],
                mask=np.zeros(len(token_ids), bool),
            )
        )


NOTHING = Completion(
    token_ids=np.zeros(0, np.int32),
    logprobs=np.zeros(0, np.float32),
    finish_reason=FINISH_NAMES[Finish.UNFINISHED],
)
"""A completion that has no token yet."""


class RolloutError(RuntimeError):
    """A rollout failed; `completions` holds those finished before.

    The cause (`__cause__`) is the original exception.

    Attributes:
      completions: sequence id -> `Completion`.
      request: the request they belong to; None for several replicas.
    """

    request: Request | None = None

    def __init__(self, message: str, completions: dict[int, Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@contextlib.contextmanager
def keeping(
    completions: Callable[[], Mapping[int, Completion]],
    request: Request,
    unfinished: Callable[[], Mapping[int, Completion]] = dict,
) -> Iterator[None]:
    """Attach the finished completions to an exception that leaves the block.

    An `Exception` becomes a `RolloutError`, even one that is the `RolloutError` of
    another request, from a rollout inside a callback. Ctrl-C, `sys.exit` and the like
    stay what they are and get an attribute `completions`. Of two nested blocks for one
    request, the inner one does this.

    Args:
      completions: called when the block raises; returns sequence -> completion.
      request: maps sequences to sequence ids.
      unfinished: called after it on Ctrl-C and the like; with the finished ones they
        become the attribute `unfinished`, sequence -> completion.
    """
    try:
        yield
    except BaseException as error:
        if getattr(error, "request", None) is request:
            raise
        done = {int(request.sequence_ids[s]): c for s, c in completions().items()}
        state = f"{len(done)} of {len(request.prompt_of)} completions"
        if isinstance(error, Exception):
            failure = RolloutError(
                f"the rollout failed after {state}, which this exception holds: "
                f"{error}",
                done,
            )
            failure.request = request
            raise failure from error
        error.completions = done  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            everything = {**unfinished(), **completions()}
            error.unfinished = everything  # type: ignore[attr-defined]
        error.request = request  # type: ignore[attr-defined]
        error.add_note(f"{state} had finished; `completions` holds them")
        raise
