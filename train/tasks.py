"""What the policy is trained on: problems, their text, their tokens and their reward.

The demo's own task is arithmetic with the working written out. The prompt is a sum, the completion rewrites it
one operation at a time until a single number is left, and that number is the answer:

    prompt "7+5-9+3="    completion "12-9+3=3+3=6"    answer "6"

A sum of n terms is written out in about n * n tokens, and n is geometric, so most completions are short and a
few are long: the shape of real reasoning rollouts. Any JSONL file of {"prompt": str, "answer": str} can take the
place of the generated one; a third field "solution" (the completion to imitate) makes a line fit for the warm-up.

Left out: any model, any sampling. Everything here is plain Python and is a function of its arguments.
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

PAD, BOS, EOS = 0, 1, 2

# Fixed, so that a trained policy can be given another file: 3 special tokens and 61 characters make 64.
CHARACTERS = "0123456789+-*/=() .,:;?!#<>%^_'\"&$\nabcdefghijklmnopqrstuvwxyz"


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
        """Token ids of `text`, without begin or end. Raises ValueError at a character outside the vocabulary."""
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
    """The sentence that names the first character of `text` outside `characters`, and the remedy."""
    column, character = next((i, c) for i, c in enumerate(text) if c not in characters)
    remedy = (
        "write it in lower case"
        if character.lower() in characters
        else "replace or remove it"
    )
    return (
        f"character {character!r} at column {column + 1} of {text!r} is not in the vocabulary; {remedy} "
        f"(the vocabulary is {characters!r})"
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of a data file.

    Attributes:
      prompt: what the policy reads.
      answer: the final answer a completion must end with.
      solution: a completion to imitate in the warm-up; None where only the answer is known.
    """

    prompt: str
    answer: str
    solution: str | None = None


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """The generated data set.

    Attributes:
      min_terms: terms, >= 2. The easiest sum.
      max_terms: terms. The hardest; its solution is the longest completion (see `longest_solution`).
      more_terms: probability in [0, 1) that a sum has one more term. Number of terms is geometric from min_terms.
      max_total: largest running total. Totals stay in 0 .. max_total, terms are 1 .. 9.
      num_warmup: problems with a solution, for supervised training.
      num_train: problems for reinforcement learning.
      num_eval: problems held out of both.
    """

    min_terms: int = 3
    max_terms: int = 16
    more_terms: float = 0.7
    max_total: int = 19
    num_warmup: int = 20_000
    num_train: int = 2_000
    num_eval: int = 64

    def __post_init__(self):
        require(self.min_terms >= 2, "min_terms", self.min_terms, "a sum has >= 2")
        require(
            self.max_terms >= self.min_terms,
            "max_terms",
            self.max_terms,
            f"it must be >= min_terms, {self.min_terms}",
        )
        require(
            0 <= self.more_terms < 1,
            "more_terms",
            self.more_terms,
            "a probability must be in [0, 1)",
        )
        require(
            self.max_total >= 9,
            "max_total",
            self.max_total,
            "it must be >= 9, the largest term",
        )
        for name in ("num_warmup", "num_train", "num_eval"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give >= 1")

    @property
    def longest_solution(self) -> int:
        """Characters of the longest solution that can be generated."""
        head = len(str(self.max_total))
        return sum(2 * (k - 1) + head + 1 for k in range(1, self.max_terms)) - 1


def require(holds: bool, name: str, value, remedy: str) -> None:
    """Raise ValueError naming the argument, its value and what to give instead, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {remedy}")


def arithmetic_problem(config: ArithmeticConfig, rng: random.Random) -> Problem:
    """Draw one sum with its solution; uses `rng` only."""
    num_terms = config.min_terms
    while num_terms < config.max_terms and rng.random() < config.more_terms:
        num_terms += 1
    totals = [rng.randint(1, 9)]
    terms = []
    for _ in range(num_terms - 1):
        term = rng.randint(1, 9)
        fits = [
            s for s in (1, -1) if 0 <= totals[-1] + s * term <= config.max_total
        ] or [0]
        sign = rng.choice(fits)
        if sign == 0:  # max_total < 18: neither fits, so step down to zero
            sign, term = -1, max(totals[-1], 1)
        terms.append(f"{'+' if sign > 0 else '-'}{term}")
        totals.append(totals[-1] + sign * term)
    lines = [f"{totals[i]}{''.join(terms[i:])}" for i in range(num_terms)]
    return Problem(
        prompt=lines[0] + "=", solution="=".join(lines[1:]), answer=str(totals[-1])
    )


def make_arithmetic(config: ArithmeticConfig, seed: int) -> dict[str, list[Problem]]:
    """Generate the three data sets, the same ones whenever `config` and `seed` are the same.

    Returns:
      "warmup" (with solutions), "train" and "eval"; no prompt of "eval" is in the other two, and the prompts of
      "eval" are distinct.
    Raises:
      ValueError: when so few sums are possible that none are left after those held out.
    """
    rng = random.Random(f"arithmetic {seed}")
    held_out: dict[str, Problem] = {}
    sets: dict[str, list[Problem]] = {"warmup": [], "train": []}
    sizes = {"warmup": config.num_warmup, "train": config.num_train}
    draws_left = 100 * (config.num_eval + sum(sizes.values()))

    def draw() -> Problem:
        nonlocal draws_left
        draws_left -= 1
        require(
            draws_left > 0,
            "num_eval",
            config.num_eval,
            "too few different sums to hold this many out; give more terms or a larger max_total",
        )
        return arithmetic_problem(config, rng)

    while len(held_out) < config.num_eval:
        problem = draw()
        held_out.setdefault(problem.prompt, problem)
    for name, size in sizes.items():
        while len(sets[name]) < size:
            problem = draw()
            if problem.prompt not in held_out:
                sets[name].append(problem)
    return {**sets, "eval": list(held_out.values())}


def write_jsonl(path: Path, problems: Iterable[Problem]) -> None:
    """Write one JSON object a line, leaving `solution` out where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for problem in problems:
            fields = dataclasses.asdict(problem)
            kept = {name: value for name, value in fields.items() if value is not None}
            file.write(json.dumps(kept) + "\n")


def read_jsonl(path: Path, tokenizer: Tokenizer) -> list[Problem]:
    """Read a data file and check every line of it.

    Raises:
      ValueError: naming file and line, when a line is not a JSON object, a field is missing, not a string or empty, or a
        character is outside the vocabulary; also when the file has no line.
    """
    problems = []
    with Path(path).open() as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                problems.append(parse_line(line, f"{path}, line {number}", tokenizer))
    if not problems:
        raise ValueError(
            f"{path} has no problems; "
            'give one JSON object a line, {"prompt": ..., "answer": ...}'
        )
    return problems


def parse_line(line: str, where: str, tokenizer: Tokenizer) -> Problem:
    """One checked line of a data file; `where` begins the message of every error."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
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
    return Problem(fields["prompt"], fields["answer"], fields.get("solution"))


def final_answer(completion: str) -> str:
    """What follows the last "=", or all of it where there is none; spaces at its ends are dropped."""
    return completion.rsplit("=", 1)[-1].strip()


def reward(
    completion: str, answer: str, *, finished: bool, format_bonus: float = 0.0
) -> float:
    """Score a completion by its final answer alone; the working is never read.

    1.0 when the policy ended the completion itself and `final_answer(completion) == answer`, else 0.0. On top of that,
    `format_bonus` goes to every completion that the policy ended itself and that ends in a whole number.

    Args:
      completion: decoded text, without the end token.
      answer: the right final answer.
      finished: whether the end token was written; False when the limit cut the completion.
      format_bonus: 0.0 (off) by default: reward is then the share of right answers.

    Example:
      >>> reward("12-9+3=3+3=6", "6", finished=True)
      1.0
    """
    if not finished:
        return 0.0
    given = final_answer(completion)
    is_number = given.removeprefix("-").isdecimal()
    return float(given == answer.strip()) + format_bonus * float(is_number)


def problem_at(problems: Sequence[Problem], position: int, seed: int) -> Problem:
    """The problem at `position` of an endless stream: the data again and again, shuffled anew each time round.

    A function of its arguments, so that the position is all a checkpoint needs to go on.
    """
    round_number, index = divmod(position, len(problems))
    order = list(range(len(problems)))
    random.Random(f"order {seed} {round_number}").shuffle(order)
    return problems[order[index]]
