"""Problems, tokenizer, files and reward of the demo."""

import random
import re

import pytest

from train import tasks
from train.tasks import ArithmeticConfig, Problem, Tokenizer

SMALL = ArithmeticConfig(max_operations=8, num_warmup=300, num_train=200, num_eval=20)


def follow(solution):
    """The totals a solution writes down, each line checked for its form."""
    pattern = re.compile(r"([a-z])([+-]\d):(\d+)([+-]\d)=(\d+)")
    lines = []
    for line in solution.split(";"):
        match = pattern.fullmatch(line)
        assert match, solution
        name, change, before, repeated, after = match.groups()
        lines.append((name, change, int(before), repeated, int(after)))
    return lines


def test_tokenizer_round_trip():
    tokenizer = Tokenizer()
    assert tokenizer.vocab_size == 64
    assert len(set(tokenizer.characters)) == 61
    text = "7;a+2;b-5?"
    prompt = tokenizer.encode_prompt(text)
    completion = tokenizer.encode_completion(text)
    assert prompt[0] == tasks.BOS
    assert completion[-1] == tasks.EOS
    assert prompt[1:] == completion[:-1]
    assert max(prompt) < tokenizer.vocab_size
    assert tokenizer.decode(prompt) == text
    assert tokenizer.decode([*completion, tasks.PAD, *completion]) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3+X", r"character 'X' at column 3 of '3\+X'.*write it in lower case"),
        ("3×4", "character '×' at column 2.*replace or remove it"),
    ],
)
def test_a_character_outside_the_vocabulary_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer().encode(text)


@pytest.mark.parametrize("slip_rate", [0.0, 0.5])
def test_a_solution_works_its_prompt_out(slip_rate):
    rng = random.Random(3)
    num_slips = 0
    for _ in range(300):
        problem = tasks.arithmetic_problem(SMALL, rng, slip_rate=slip_rate)
        start, *operations = problem.prompt.removesuffix("?").split(";")
        lines = follow(problem.solution)
        assert [name + change for name, change, *_ in lines] == operations
        total = int(start)
        truth = total + sum(int(change) for _, change, *_ in lines)
        assert problem.answer == str(truth)
        for _, change, before, repeated, after in lines:
            assert before == total  # a slip is carried on
            assert repeated == change
            assert 0 <= after <= SMALL.max_total
            num_slips += after != before + int(change)
            total = after
    assert (num_slips > 0) == (slip_rate > 0)


def test_data_is_a_function_of_config_and_seed():
    first, again = tasks.make_arithmetic(SMALL, 5), tasks.make_arithmetic(SMALL, 5)
    other = tasks.make_arithmetic(SMALL, 6)
    assert first == again
    assert first["train"] != other["train"]
    assert {name: len(lines) for name, lines in first.items()} == {
        "warmup": 300,
        "train": 200,
        "eval": 20,
    }


def test_held_out_prompts_are_distinct_and_held_out():
    sets = tasks.make_arithmetic(SMALL, 0)
    held_out = {problem.prompt for problem in sets["eval"]}
    assert len(held_out) == 20
    for name in ("warmup", "train"):
        assert not held_out & {problem.prompt for problem in sets[name]}


def is_right(problem):
    return tasks.final_answer(problem.solution or "") == problem.answer


def test_only_the_warmup_slips():
    sets = tasks.make_arithmetic(SMALL, 0)
    for name in ("train", "eval"):
        assert all(is_right(p) for p in sets[name])
    right = [is_right(p) for p in sets["warmup"]]
    assert 0.5 < sum(right) / len(right) < 0.8


def test_completion_lengths_have_a_long_tail():
    config = ArithmeticConfig(num_warmup=1, num_train=4000, num_eval=1)
    train = tasks.make_arithmetic(config, 0)["train"]
    lengths = [len(p.solution or "") + 1 for p in train]
    assert max(lengths) <= config.longest_solution
    most = sum(10 <= length <= 40 for length in lengths) / len(lengths)
    few = sum(length >= 200 for length in lengths) / len(lengths)
    # Geometric with 0.65: 0.82 of the short ones have at most 4 operations; of the 5 %
    # long ones 5 in 13 have 20 or more. Standard errors 0.007 and 0.002.
    assert 0.95 * 0.82 - 0.03 < most < 0.95 * 0.82 + 0.03
    assert 0.01 < few < 0.03


def test_too_few_problems_to_hold_out():
    config = ArithmeticConfig(
        max_operations=1, num_eval=1000, num_warmup=1, num_train=1
    )
    with pytest.raises(ValueError, match="num_eval=1000: too few different problems"):
        tasks.make_arithmetic(config, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("more_operations", 1.0, r"give a chance in \[0, 1\)"),
        ("long_share", 1.1, "give a share"),
        ("max_operations", 27, r"give 1 \.\. 26"),
        ("max_total", 8, "give >= 9"),
        ("slip_rate", -0.1, "give a chance"),
        ("num_train", 0, "give >= 1"),
    ],
)
def test_bad_task_configs(name, value, message):
    with pytest.raises(ValueError, match=rf"{name}={value}.*{message}"):
        ArithmeticConfig(**{name: value})


def test_files_round_trip(tmp_path):
    problems = [Problem("1+1=", "2"), Problem("2;a+1?", "3", solution="a+1:2+1=3")]
    path = tmp_path / "data" / "problems.jsonl"
    tasks.write_jsonl(path, problems)
    assert "solution" not in path.read_text().splitlines()[0]
    assert tasks.read_jsonl(path, Tokenizer()) == problems


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        ("[1, 2]", "line 2: a JSON list; give an object"),
        ('{"prompt": "1+1="}', 'line 2: "answer" is None'),
        ('{"prompt": " ", "answer": "2"}', "line 2: \"prompt\" is ' '"),
        ('{"prompt": "1+1=", "answer": 2}', 'line 2: "answer" is 2; give a string'),
        (
            '{"prompt": "1 + 1 =", "answer": "ä"}',
            "line 2, \"answer\": character 'ä' at column 1",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.read_jsonl(path, Tokenizer())


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no problems; give one JSON object"):
        tasks.read_jsonl(path, Tokenizer())


@pytest.mark.parametrize(
    ("completion", "finished", "bonus", "expected"),
    [
        ("a+2:7+2=9;b-5:9-5=4", True, 0.0, 1.0),
        ("4", True, 0.0, 1.0),  # the working is never read
        ("a+2:7+2=9;b-5:9-5= 4 ", True, 0.0, 1.0),
        ("b-5:9-5=14", True, 0.0, 0.0),
        ("b-5:9-5=4", False, 0.0, 0.0),  # cut off by the limit
        ("4=", True, 0.0, 0.0),
        ("", True, 0.5, 0.0),
        ("b-5:9-5=3", True, 0.25, 0.25),
        ("b-5:9-5=-3", True, 0.25, 0.25),
        ("b-5:9-5=4", True, 0.25, 1.25),
        ("b-5:9-5=x", True, 0.25, 0.0),
    ],
)
def test_reward(completion, finished, bonus, expected):
    given = tasks.reward(completion, "4", finished=finished, format_bonus=bonus)
    assert given == expected


def test_the_stream_takes_every_problem_once_each_time_round():
    problems = [Problem(str(i), str(i)) for i in range(7)]
    stream = [tasks.problem_at(problems, i, seed=1) for i in range(21)]
    rounds = [stream[i : i + 7] for i in (0, 7, 14)]
    for taken in rounds:
        assert sorted(taken, key=lambda p: p.prompt) == problems
    assert rounds[0] != rounds[1]
    assert stream[9] == tasks.problem_at(problems, 9, seed=1)
