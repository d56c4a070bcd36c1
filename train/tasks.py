"""Tasks: the problems that a policy is trained on, as text and as tokens.

The demo's own task is arithmetic with the working written out. A prompt starts from a
number and names operations. The completion takes them in order: it copies each, puts
the running total in front and writes the result. The last result is the answer:

    prompt "7;a+2;b-5?"    completion "a+2:7+2=9;b-5:9-5=4"    answer "4"

Most prompts have a few operations and some have many, so that most completions are
short and a few are long, as those of real reasoning are. The solutions that the warm-up
imitates contain slips, which leaves reinforcement learning something to correct.

Any JSONL file of {"prompt": str, "answer": str} can take the place of the generated
problems. A line with a third field "solution", a completion to imitate, can be used by
the warm-up too.

Left out: models and sampling. Everything here is plain Python.
"""

import dataclasses
import functools
import io
import json
import random
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from train.files import replace_text
from train.settings import check_types, require

PAD, BOS, EOS = 0, 1, 2

# The same for every data file, so that a trained policy can be given another one. With
# the three special tokens the vocabulary has 64 entries.
CHARACTERS = "0123456789+-*/=() .,:;?!#<>%^_'\"&$\nabcdefghijklmnopqrstuvwxyz"


class AnyTokenizer(Protocol):
    """A tokenizer: the demo's, or that of a checkpoint."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids; ValueError if a part of it has none."""
        ...

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids that a rollout starts from, special tokens included."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of a completion, without special tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """One token per character; tokens 0, 1 and 2 are padding, begin and end.

    Example:
      >>> Tokenizer().encode_prompt("1+2=")
      [1, 4, 13, 5, 17]
      >>> Tokenizer().decode([6, 2, 0])
      '3'
    """

    characters: str = CHARACTERS

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the three special ones included."""
        return len(self.characters) + 3

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without begin or end.

        Raises:
          ValueError: naming a character outside the vocabulary.
        """
        try:
            return [self.characters.index(character) + 3 for character in text]
        except ValueError:
            raise ValueError(bad_character(text, self.characters)) from None

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return `[begin, *characters]`, which a rollout starts from."""
        return [BOS, *self.encode(prompt)]

    def encode_completion(self, completion: str) -> list[int]:
        """Return `[*characters, end]`, which a policy should write."""
        return [*self.encode(completion), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the characters up to the first end token, without special tokens."""
        text = []
        for token in tokens:
            if token == EOS:
                break
            if token >= 3:
                text.append(self.characters[token - 3])
        return "".join(text)


def bad_character(text: str, characters: str) -> str:
    """Return a message about the first character of `text` outside `characters`."""
    column, character = next((i, c) for i, c in enumerate(text) if c not in characters)
    remedy = (
        "write it in lower case"
        if character.lower() in characters
        else "replace or remove it"
    )
    return (
        f"character {character!r} at column {column + 1} of {text!r} is not in the "
        f"vocabulary; {remedy} (the vocabulary is {characters!r})"
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of a data file.

    Attributes:
      prompt: what the policy reads.
      answer: the final answer that a completion must end with.
      solution: a completion to imitate in the warm-up; None where none is known.
    """

    prompt: str
    answer: str
    solution: str | None = None


# The names of a problem's operations, in order.
NAMES = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """The generated problems.

    Attributes:
      more_operations: chance in [0, 1) of one more operation after each; the number of
        operations is geometric, from 1.
      long_share: share in [0, 1] of prompts whose number of operations is uniform in
        the upper half, max_operations // 2 .. max_operations.
      max_operations: 1 .. 26. About 10 completion tokens each.
      max_total: largest running total, >= 9. Totals stay in 0 .. max_total and
        operands in 1 .. 9.
      slip_rate: chance in [0, 1) of each operation in a warm-up solution to have a
        wrong result, as in text written by people. The warm-up teaches the policy to
        slip as often, and reinforcement learning, which sees answers only, not to.
      num_warmup: problems for supervised training.
      num_train: problems for reinforcement learning.
      num_eval: problems held out of both.
    """

    more_operations: float = 0.65
    long_share: float = 0.05
    max_operations: int = 24
    max_total: int = 9
    slip_rate: float = 0.15
    num_warmup: int = 20_000
    num_train: int = 2_000
    num_eval: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        more, share = self.more_operations, self.long_share
        require(0 <= more < 1, "more_operations", more, "give a chance in [0, 1)")
        require(0 <= share <= 1, "long_share", share, "give a share in [0, 1]")
        slips = self.slip_rate
        require(0 <= slips < 1, "slip_rate", slips, "give a chance in [0, 1)")
        require(
            1 <= self.max_operations <= len(NAMES),
            "max_operations",
            self.max_operations,
            f"operations are named a to z, so give 1 .. {len(NAMES)}",
        )
        require(
            self.max_total >= 9,
            "max_total",
            self.max_total,
            "a prompt starts from up to 9, so give >= 9",
        )
        for name in ("num_warmup", "num_train", "num_eval"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give >= 1")

    @property
    def longest_solution(self) -> int:
        """Characters that no generated solution exceeds."""
        digits = len(str(self.max_total))
        return self.max_operations * len("a+9:+9=;") + self.max_operations * 2 * digits


def arithmetic_problem(
    config: ArithmeticConfig, rng: random.Random, *, slip_rate: float = 0.0
) -> Problem:
    """Draw one problem with its solution.

    Args:
      config: sizes. rng: the source of every random choice.
      slip_rate: chance of each operation to have a wrong result, with which the
        solution goes on; the answer stays the right one. An operation has no slip when
        every wrong result would lead a later total out of 0 .. max_total.
    """
    num_operations = 1
    if rng.random() < config.long_share:
        fewest = max(1, config.max_operations // 2)
        num_operations = rng.randint(fewest, config.max_operations)
    else:
        while (
            num_operations < config.max_operations
            and rng.random() < config.more_operations
        ):
            num_operations += 1
    allowed = range(config.max_total + 1)
    totals, changes = [rng.randint(1, 9)], []
    for _ in range(num_operations):
        fits = [n for n in range(-9, 10) if n != 0 and totals[-1] + n in allowed]
        changes.append(rng.choice(fits))
        totals.append(totals[-1] + changes[-1])

    written = list(totals)
    for i in range(1, num_operations + 1):
        if rng.random() < slip_rate:
            least, most = min(written[i:]), max(written[i:])
            shifts = [n for n in range(-least, allowed[-1] - most + 1) if n != 0]
            shift = rng.choice(shifts) if shifts else 0
            written[i:] = [total + shift for total in written[i:]]

    steps = [f"{name}{n:+d}" for name, n in zip(NAMES, changes, strict=False)]
    lines = [
        f"{step}:{before}{change:+d}={after}"
        for step, change, before, after in zip(
            steps, changes, written, written[1:], strict=False
        )
    ]
    return Problem(
        prompt=";".join([str(totals[0]), *steps]) + "?",
        solution=";".join(lines),
        answer=str(totals[-1]),
    )


def make_arithmetic(config: ArithmeticConfig, seed: int) -> dict[str, list[Problem]]:
    """Generate the three data sets; the same for the same `config` and `seed`.

    Returns:
      "warmup", "train" and "eval". The prompts of "eval" are distinct and in neither of
      the other two.
    Raises:
      ValueError: so few problems are possible that too few are left to train on.
    """
    rng = random.Random(f"arithmetic {seed}")
    held_out: dict[str, Problem] = {}
    sets: dict[str, list[Problem]] = {"warmup": [], "train": []}
    sizes = {"warmup": config.num_warmup, "train": config.num_train}
    draws_left = 100 * (config.num_eval + sum(sizes.values()))

    def draw(slip_rate: float) -> Problem:
        nonlocal draws_left
        draws_left -= 1
        require(
            draws_left > 0,
            "num_eval",
            config.num_eval,
            "too few different problems to hold this many out; allow more operations",
        )
        return arithmetic_problem(config, rng, slip_rate=slip_rate)

    while len(held_out) < config.num_eval:
        problem = draw(slip_rate=0.0)
        held_out.setdefault(problem.prompt, problem)
    for name, size in sizes.items():
        while len(sets[name]) < size:
            problem = draw(slip_rate=config.slip_rate if name == "warmup" else 0.0)
            if problem.prompt not in held_out:
                sets[name].append(problem)
    return {**sets, "eval": list(held_out.values())}


def write_jsonl(path: Path, problems: Iterable[Problem]) -> None:
    """Write one JSON object a line, without "solution" where there is none."""
    lines = []
    for problem in problems:
        fields = dataclasses.asdict(problem)
        kept = {name: value for name, value in fields.items() if value is not None}
        lines.append(json.dumps(kept) + "\n")
    replace_text(path, "".join(lines))


def read_jsonl(
    path: Path, tokenizer: AnyTokenizer, *, max_prompt: int | None = None
) -> list[Problem]:
    """Read a data file and check every line of it.

    Args:
      path: a file in UTF-8. tokenizer: of the policy.
      max_prompt: the longest prompt, in tokens, that leaves the policy room for a
        completion; None is no limit.
    Raises:
      ValueError: the file cannot be read or has no problems; or, naming the line, a
        line is not UTF-8 or not a JSON object, a field is missing, empty or not a
        string, a character is outside the vocabulary, or a prompt is too long.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"data={str(path)!r} cannot be read ({error.strerror}); give a JSONL file"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {number}: byte {data[error.start]:#04x} is not UTF-8; save "
            "the file in that encoding"
        ) from None
    problems = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            problems.append(parse_line(line, where, tokenizer, max_prompt))
    if not problems:
        raise ValueError(
            f"{path} has no problems; "
            'give one JSON object a line, {"prompt": ..., "answer": ...}'
        )
    return problems


def parse_line(
    line: str, where: str, tokenizer: AnyTokenizer, max_prompt: int | None = None
) -> Problem:
    """Check one line of a data file and return its problem.

    Args:
      line: JSON. where: file and line number, with which every message begins.
      tokenizer, max_prompt: as in `read_jsonl`.
    Raises:
      ValueError: as `read_jsonl`.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}); give one JSON object a line"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{where}: a JSON {type(fields).__name__}; give an object with "
            '"prompt" and "answer"'
        )
    for name in ("prompt", "answer", "solution"):
        value = fields.get(name)
        if value is None and name == "solution":
            continue
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f'{where}: "{name}" is {value!r}; give a string that is not empty'
            )
        try:
            tokenizer.encode(value)
        except ValueError as error:
            raise ValueError(f'{where}, "{name}": {error}') from None
    try:
        size = len(tokenizer.encode_prompt(fields["prompt"]))
    except Exception as error:  # a checkpoint's chat template is a program
        raise ValueError(
            f'{where}: "prompt" cannot be turned into tokens '
            f"({type(error).__name__}: {error})"
        ) from error
    if size == 0:
        raise ValueError(f'{where}: "prompt" has no tokens; give at least one')
    if max_prompt is not None and size > max_prompt:
        raise ValueError(
            f'{where}: "prompt" has {size} tokens, and the policy\'s positions leave '
            f"{max_prompt} beside grpo.max_new_tokens; shorten it, or lower that"
        )
    return Problem(fields["prompt"], fields["answer"], fields.get("solution"))


def final_answer(completion: str) -> str:
    """Return the text after the last "=", or all of it without one, stripped."""
    return completion.rsplit("=", 1)[-1].strip()


def reward(
    completion: str, answer: str, *, finished: bool, format_bonus: float = 0.0
) -> float:
    """Return the reward of a completion, which depends on its final answer alone.

    The reward is 1.0 when the policy ended the completion itself and its final answer
    is the right one, else 0.0. A completion that the policy ended itself and whose
    final answer is a whole number, right or wrong, gets `format_bonus` on top.

    Args:
      completion: decoded text, without the end token.
      answer: the right final answer.
      finished: whether the policy wrote the end token; False at the length limit.
      format_bonus: 0.0 is off; the mean reward is then the share of right answers.

    Example:
      >>> reward("a+2:7+2=9;b-5:9-5=4", "4", finished=True)
      1.0
    """
    if not finished:
        return 0.0
    given = final_answer(completion)
    is_number = given.removeprefix("-").isdecimal()
    return float(given == answer.strip()) + format_bonus * float(is_number)


def problem_at(problems: Sequence[Problem], position: int, seed: int) -> Problem:
    """Return the problem at `position` of an endless stream.

    Every epoch takes all problems once, in an order of its own. The result depends on
    nothing but the arguments, so a checkpoint needs the position only.
    """
    epoch, index = divmod(position, len(problems))
    return problems[_order(len(problems), seed, epoch)[index]]


@functools.lru_cache(maxsize=2)  # one step may end an epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> Sequence[int]:
    """Return the order in which an epoch takes its problems."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order
