"""What the policy is trained on: problems, their text, their tokens and their reward.

The demo's own task is arithmetic with the working written out. A prompt starts from a
number and names operations; the completion takes them in order, copying each, putting
the running total in front and writing the result; the last result is the answer:

    prompt "7;a+2;b-5?"    completion "a+2:7+2=9;b-5:9-5=4"    answer "4"

Most prompts have a few operations and some have many, so that most completions are
short and a few are long: the shape of real reasoning rollouts. The solutions that the
warm-up imitates contain slips, which leaves reinforcement learning something to do.

Any JSONL file of {"prompt": str, "answer": str} can take the place of the generated
problems; a third field "solution" (a completion to imitate) makes a line fit for the
warm-up.

Left out: any model, any sampling. Everything here is plain Python, a function of its
arguments.
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

# Fixed, so that a trained policy can be given another file: with the three special
# tokens they make 64.
CHARACTERS = "0123456789+-*/=() .,:;?!#<>%^_'\"&$\nabcdefghijklmnopqrstuvwxyz"


class AnyTokenizer(Protocol):
    """What turns text into ids and back: the demo's, or a checkpoint's."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone; ValueError where a part of it has none."""
        ...

    def encode_prompt(self, prompt: str) -> list[int]:
        """What a rollout is given."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a completion, without special tokens."""
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
        """Token ids of `text`, without begin or end.

        Raises:
          ValueError: naming a character outside the vocabulary.
        """
        try:
            return [self.characters.index(character) + 3 for character in text]
        except ValueError:
            raise ValueError(bad_character(text, self.characters)) from None

    def encode_prompt(self, prompt: str) -> list[int]:
        """`[begin, *characters]`: what a rollout is given."""
        return [BOS, *self.encode(prompt)]

    def encode_completion(self, completion: str) -> list[int]:
        """`[*characters, end]`: what a policy should write."""
        return [*self.encode(completion), EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters up to the first end token; padding and begin are dropped."""
        text = []
        for token in tokens:
            if token == EOS:
                break
            if token >= 3:
                text.append(self.characters[token - 3])
        return "".join(text)


def bad_character(text: str, characters: str) -> str:
    """Say which character of `text` is the first outside `characters`, and a remedy."""
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
      answer: the final answer a completion must end with.
      solution: a completion to imitate in the warm-up; None where it is not known.
    """

    prompt: str
    answer: str
    solution: str | None = None


# The operations of a problem are named in this order.
NAMES = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """The generated data.

    Attributes:
      more_operations: chance in [0, 1) that a prompt has one more operation; their
        number is geometric from 1.
      long_share: share in [0, 1] of prompts whose number of operations is uniform in
        the upper half, max_operations // 2 .. max_operations.
      max_operations: 1 .. 26. About 10 completion tokens each.
      max_total: largest running total, >= 9. Totals stay in 0 .. max_total and
        operands in 1 .. 9.
      slip_rate: chance in [0, 1) of each operation in a warm-up solution to be worked
        out wrong, as in text written by people. The policy learns to slip as often,
        and reinforcement learning, which sees answers only, to stop it.
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
    """Draw one problem with its solution; uses `rng` only.

    Args:
      config: sizes. rng: where every choice comes from.
      slip_rate: chance of each operation to be given a wrong result, from which the
        solution goes on; the answer stays the right one. An operation is spared where
        every wrong result would lead out of 0 .. max_total later on.
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
    """Generate the three data sets, a function of `config` and `seed`.

    Returns:
      "warmup", "train" and "eval"; the prompts of "eval" are distinct and in none of
      the other two.
    Raises:
      ValueError: so few problems are possible that holding some out leaves too few.
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
    """Write one JSON object a line, leaving `solution` out where there is none."""
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
      max_prompt: tokens that leave room for a completion in the policy's positions;
        None is no limit.
    Raises:
      ValueError: naming file and line, when it is not UTF-8 or not a JSON object, a
        field is missing, not a string or empty, a character is outside the vocabulary,
        or a prompt is too long; also when the file cannot be read or has no line.
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
    """One checked line of a data file; `where` begins the message of every error."""
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
    """Return what follows the last "=", or all where there is none, stripped."""
    return completion.rsplit("=", 1)[-1].strip()


def reward(
    completion: str, answer: str, *, finished: bool, format_bonus: float = 0.0
) -> float:
    """Score a completion by its final answer alone; the working is never read.

    1.0 when the policy ended the completion itself and `final_answer(completion)` is
    the answer, else 0.0. On top of that, `format_bonus` goes to every completion that
    the policy ended itself and whose final answer is a whole number, right or wrong.

    Args:
      completion: decoded text, without the end token.
      answer: the right final answer.
      finished: whether the end token was written; False when the limit cut it.
      format_bonus: 0.0 (off) by default: reward is then the share of right answers.

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
    """Return the problem at `position` of an endless stream, shuffled each time round.

    A function of its arguments: the position is all a checkpoint needs to go on.
    """
    round_number, index = divmod(position, len(problems))
    return problems[_order(len(problems), seed, round_number)[index]]


@functools.lru_cache(maxsize=2)  # one step may end a round and begin the next
def _order(count: int, seed: int, round_number: int) -> Sequence[int]:
    """The order in which a round takes its problems."""
    order = list(range(count))
    random.Random(f"order {seed} {round_number}").shuffle(order)
    return order
