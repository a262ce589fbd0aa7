"""The constants at the top of the file, edited in any way that is Python; flags and arguments; what each refuses."""

import ast
import io
import math
import os
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from conftest import SCRIPT, make_m2n2, run_script, small
from torch import Tensor, nn

import m2n2_mnist as script
from m2n2_mnist import M2N2, MLP, MNISTDataModule

TEXT = SCRIPT.read_text(encoding="utf-8")
NAMES = list(vars(script.parse_constants([])[0]))
PLACES = {  # of each constant: its first and last line
    node.targets[0].id: (node.lineno - 1, node.end_lineno)
    for node in ast.parse(TEXT).body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in NAMES
}
TOP = min(PLACES.values())[0], max(PLACES.values())[1]  # the lines of them all
QUICK = {  # a run of a moment on `write_mnist`'s data
    "ITERATIONS": "ITERATIONS = 4",
    "TEST_EVERY": "TEST_EVERY = 2",
    "IMAGE_SIZE": "IMAGE_SIZE = 7",
    "HIDDEN_DIM": "HIDDEN_DIM = 8",
    "ACCELERATOR": "ACCELERATOR = 'cpu'",
}


def edited(text: str = TEXT, **lines: str) -> str:
    """The script with other lines for these constants; "" takes one away."""
    rows = text.split("\n")
    for name, line in lines.items():
        first, last = PLACES[name]
        rows[first:last] = [line] + [""] * (last - first - 1)
    return "\n".join(rows)


def load(text: str) -> ModuleType:
    """The edited script as a module, without the figure, which takes most of a short run."""
    path = Path("edited.py")
    path.write_text(text, encoding="utf-8", newline="")
    module = ModuleType("edited")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    module.plot_evolution = lambda *_: None
    return module


def recorded() -> dict:
    """What the only run wrote down of its constants."""
    (path,) = Path.cwd().rglob("hparams.yaml")
    return yaml.safe_load(path.read_text())


def one_line(error: str, *parts: str) -> bool:
    return error.endswith("\n") and error.count("\n") == 1 and all(part in error for part in parts)


def in_reverse(text: str) -> str:
    rows = text.split("\n")
    rows[slice(*TOP)] = rows[slice(*TOP)][::-1]
    return "\n".join(rows)


def without_comments(text: str) -> str:
    """The whole file less every comment."""
    rows = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            rows[row] = rows[row][: token.start[1]].rstrip()
    return "\n".join(rows)


# Edits

EDITS = {  # the lines, and the values they stand for
    "no comment": ({"SEED": "SEED = 7"}, {"SEED": 7}),
    "one space before #": ({"SEED": "SEED = 7 # seed of the first run"}, {"SEED": 7}),
    "no space at all": ({"SEED": "SEED=7# seed"}, {"SEED": 7}),
    "a tab": ({"SEED": "SEED\t=\t7\t# seed"}, {"SEED": 7}),
    "aligned": ({"SEED": "SEED             = 7        # seed"}, {"SEED": 7}),
    "a semicolon": ({"SEED": "SEED = 7;"}, {"SEED": 7}),
    "own comment": ({"SEED": "SEED = 7  # [0, 9] lucky | (default: 3) {x} \\ 'it' 💡"}, {"SEED": 7}),
    "percent in a comment": ({"ALPHA": "ALPHA = 0.5  # 50 % of it, %s, %(prog)s, 100%"}, {"ALPHA": 0.5}),
    "comment above": ({"SEED": "# SEED = 3  # an older one\nSEED = 7"}, {"SEED": 7}),
    "empty comment": ({"SEED": "SEED = 7  #"}, {"SEED": 7}),
    "parentheses": ({"SEED": "SEED = (\n    3  # three\n    + 4\n)  # seven"}, {"SEED": 7}),
    "backslash": ({"SEED": "SEED = \\\n    7"}, {"SEED": 7}),
    "annotated": (
        {"SEED": "SEED: int = 7  # seed", "SCORE": "SCORE: str = 'correct'"},
        {"SEED": 7, "SCORE": "correct"},
    ),
    "computed": ({"ITERATIONS": "ITERATIONS = 8", "TEST_EVERY": "TEST_EVERY = ITERATIONS // 4"}, {"TEST_EVERY": 2}),
    "computed bool": ({"USE_ATTRACTION": "USE_ATTRACTION = ALPHA > 3"}, {"USE_ATTRACTION": False}),
    "of the environment": ({"SEED": "SEED = int(os.environ['MINE'])"}, {"SEED": 7}),
    "folder of the environment": ({"OUTPUT_DIR": "OUTPUT_DIR = os.environ.get('MINE')"}, {"OUTPUT_DIR": "7"}),
    "f-string": ({"OUTPUT_DIR": 'OUTPUT_DIR = f"runs-{SEED}"'}, {"OUTPUT_DIR": "runs-42"}),
    "two in one line": ({"SEED": "SEED = 7; ALPHA = 0.5  # two", "ALPHA": ""}, {"SEED": 7, "ALPHA": 0.5}),
    "a tuple": ({"SEED": "SEED, ALPHA = 7, 0.5", "ALPHA": ""}, {"SEED": 7, "ALPHA": 0.5}),
    "chained": ({"TEST_EVERY": "TEST_EVERY = CHECKPOINT_EVERY = 3", "CHECKPOINT_EVERY": ""}, {"CHECKPOINT_EVERY": 3}),
    "conditional": ({"SEED": "if os.name:\n    SEED = 7\nelse:\n    SEED = 8"}, {"SEED": 7}),
    "of a function": ({"SEED": "def mine():\n    return 7\n\n\nSEED = mine()"}, {"SEED": 7}),
    "set again": ({"SEED": "SEED = 3\nSEED += 4"}, {"SEED": 7}),
    "own constants": ({"SEED": "MINE = [1, None]\nBATCH_SIZE = 'x'\nSEED = 7"}, {"SEED": 7}),
    "whole floats": (
        {"ITERATIONS": "ITERATIONS = 1e1", "CHECKPOINT_EVERY": "CHECKPOINT_EVERY = 1e2", "SEED": "SEED = 7.0"},
        {"ITERATIONS": 10, "CHECKPOINT_EVERY": 100, "SEED": 7},
    ),
    "underscores": ({"SEED": "SEED = 1_000_000", "ALPHA": "ALPHA = 0.2_5"}, {"SEED": 10**6, "ALPHA": 0.25}),
    "hexadecimal": ({"SEED": "SEED = 0xFF"}, {"SEED": 255}),
    "integer for a number": ({"ALPHA": "ALPHA = 1", "MUTATION_STD": "MUTATION_STD = 0"}, {"ALPHA": 1.0}),
    "NumPy's": (
        {
            "SEED": "SEED = np.int64(7)",
            "ITERATIONS": "ITERATIONS = np.arange(9)[8]",
            "HIDDEN_DIM": "HIDDEN_DIM = np.uint8(9)",
            "ARCHIVE_SIZE": "ARCHIVE_SIZE = np.float64(3)",
            "ALPHA": "ALPHA = np.float32(0.5)",
            "USE_CROSSOVER": "USE_CROSSOVER = np.bool_(False)",
        },
        {"SEED": 7, "ITERATIONS": 8, "HIDDEN_DIM": 9, "ARCHIVE_SIZE": 3, "ALPHA": 0.5, "USE_CROSSOVER": False},
    ),
    "a Path": ({"OUTPUT_DIR": "OUTPUT_DIR = Path('mine') / 'runs'"}, {"OUTPUT_DIR": "mine/runs"}),
    "home": ({"OUTPUT_DIR": "OUTPUT_DIR = '~/mine'"}, {"OUTPUT_DIR": "{home}/mine"}),
    "home in a Path": ({"OUTPUT_DIR": "OUTPUT_DIR = Path('~', 'mine')"}, {"OUTPUT_DIR": "{home}/mine"}),
    "a string with #": ({"OUTPUT_DIR": 'OUTPUT_DIR = "run #1"  # the first'}, {"OUTPUT_DIR": "run #1"}),
    "a string with # alone": ({"OUTPUT_DIR": "OUTPUT_DIR = 'run #1 %s'"}, {"OUTPUT_DIR": "run #1 %s"}),
    "NumPy's text": (
        {"OUTPUT_DIR": "OUTPUT_DIR = np.str_('mine')", "SCORE": "SCORE = np.str_('correct')"},
        {"OUTPUT_DIR": "mine", "SCORE": "correct"},
    ),
    "three quotes": ({"OUTPUT_DIR": 'OUTPUT_DIR = """mine"""'}, {"OUTPUT_DIR": "mine"}),
    "capitals": ({"SCORE": "SCORE = 'Correct'", "PRECISION": "PRECISION = '32-TRUE'"}, {"SCORE": "correct"}),
    "the largest seed": ({"SEED": "SEED = 2**32 - 1"}, {"SEED": 2**32 - 1}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_that_is_python(
    edit: str, data_dir: Path, tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run takes the value, plain in hparams.yaml; so does --help."""
    monkeypatch.setenv("MINE", "7")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines, expected = EDITS[edit]
    module = load(edited(**QUICK | lines))
    code, out, error = main(module=module)
    assert code == 0 and "Evolution finished." in out, error
    found = recorded()
    assert set(found) == set(NAMES) and all(type(value) in (int, float, bool, str) for value in found.values())
    for name, value in expected.items():
        if isinstance(value, str):
            value = value.format(home=tmp_path / "home")
        assert found[name] == value and type(found[name]) is type(value)
    code, out, _ = main("--help", module=module)
    assert code == 0 and all(f"--{name.lower().replace('_', '-')} " in out for name in NAMES)


@pytest.mark.parametrize(
    "change",
    [without_comments, in_reverse, lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text],
    ids=["no comments", "another order", "Windows line ends", "byte order mark"],
)
def test_the_constants_whole_block(change: Callable[[str], str], data_dir: Path, main: Callable) -> None:
    """What is said about a constant, and where it stands, is for its reader alone."""
    changed = change(edited(**QUICK))
    assert changed != edited(**QUICK)
    code, out, error = main(module=load(changed))
    assert code == 0 and "Evolution finished." in out, error
    found = recorded()
    assert found | {"ACCELERATOR": "", "PRECISION": ""} == {
        **vars(load(edited(**QUICK)).parse_constants([])[0]),
        "ACCELERATOR": "",  # "auto" is resolved
        "PRECISION": "",
    }
    assert main("--help", module=load(changed))[0] == 0


def test_an_edited_file_as_a_process(data_dir: Path) -> None:
    """Many edits and no comments at all, as a user runs it: nothing here hangs on how the tests load it."""
    lines = {
        "SEED": "SEED = 7",
        "ITERATIONS": "ITERATIONS = 1e1",
        "TEST_EVERY": "TEST_EVERY = ITERATIONS // 5",
        "OUTPUT_DIR": "OUTPUT_DIR = Path('my runs #1')",
        "ALPHA": "ALPHA: float = (\n    0.5\n)",
    }
    Path("edited.py").write_text(without_comments(edited(**QUICK | lines)))
    done = run_script(path=Path("edited.py"))
    assert done.returncode == 0 and "Evolution finished." in done.stdout, done.stderr
    expected = {"SEED": 7, "ITERATIONS": 10, "TEST_EVERY": 2, "OUTPUT_DIR": "my runs #1", "ALPHA": 0.5}
    assert expected.items() <= recorded().items()


@pytest.mark.usefixtures("no_figure")
def test_every_constant_reaches_what_it_is_for(data_dir: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the algorithm become attributes of the M2N2; each USE_ is told from the others."""
    made = []

    def evolve(m2n2: M2N2, *arguments: object) -> None:
        made.append(m2n2)

    monkeypatch.setattr(script.M2N2, "evolve", evolve)
    values = {"archive_size": 3, "score": "correct", "temperature": 2.5, "alpha": 0.25, "init_std": 0.125}
    values |= {"mutation_std": 0.5, "final_mutation_std": 0.75, "eval_batch_size": 77}
    switches = [name.lower() for name in NAMES if name.startswith("USE_")]
    for switch in switches:
        code, _, error = main(*small(data_dir=data_dir, **values, iterations=9, seed=5, **{switch: "false"}))
        assert code == 0, error
        m2n2 = made.pop()
        assert {name: getattr(m2n2, name) for name in values} == values
        assert {name: getattr(m2n2, name) for name in switches} == {name: name != switch for name in switches}
        assert m2n2.schedule == 9 and m2n2.archive.shape == (3, 49 * 8 + 8 + 8 * 10 + 10)
        assert m2n2._generator.initial_seed() == 5
    taken = {*values, *switches, "iterations", "seed", "image_size", "hidden_dim"}
    elsewhere = {"runs", "test_every", "checkpoint_every", "resume", "data_dir", "output_dir", "start"}
    assert taken | elsewhere | {"accelerator", "precision"} == {name.lower() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_taken_away(name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        load(edited(**{name: ""}))
    message = stop.value.code  # which is printed, with exit code 1
    assert isinstance(message, str) and "\n" not in message
    assert [word for word in re.findall(r"[A-Z_]{4,}", message) if word in NAMES] == [name]


def test_constants_taken_away_as_a_process() -> None:
    Path("edited.py").write_text(edited(SEED="", ALPHA="# ALPHA = 1.0"))
    done = run_script(path=Path("edited.py"))
    assert done.returncode == 1 and not done.stdout and one_line(done.stderr, "SEED", "ALPHA", "edited.py")
    assert os.listdir() == ["edited.py"]


# Refusals

NO_NUMBERS = [
    "float('nan')",
    "float('inf')",
    "-math.inf",
    "True",
    "False",
    "None",
    "'5'",
    "'five'",
    "''",
    "[5]",
    "(5,)",
]
NO_NUMBERS += ["{}", "5j", "b'5'", "int", "np.nan", "torch.tensor(5)", "np.eye(3)", "lambda: 5", "np.bool_(1)"]
NO_SWITCHES = ["0", "1", "1.0", "'True'", "'no'", "None", "[]", "[True]", "np.int64(1)", "float('nan')"]
NO_CHOICES = ["None", "True", "0", "''", "'other'", "b'auto'", "['auto']", "Path('auto')", "'auto '", "float('nan')"]
NO_FOLDERS = ["None", "True", "0", "5", "b'data'", "['data']", "float('nan')", "{}"]
LIMITS = {  # of each number: what is just outside
    "SEED": ["-1", "2**32", "-1.0", "1e300"],
    "RUNS": ["0", "-1"],
    "ITERATIONS": ["0", "-5", "10**18"],
    "TEST_EVERY": ["0", "-1"],
    "CHECKPOINT_EVERY": ["0", "-1"],
    "IMAGE_SIZE": ["0", "29", "-7"],
    "HIDDEN_DIM": ["0", "-1", "10**9"],
    "ARCHIVE_SIZE": ["1", "0", "-1", "10**9"],
    "EVAL_BATCH_SIZE": ["-1", "10**30"],
    "TEMPERATURE": ["0", "-1.0", "1e-9", "1e9"],
    "ALPHA": ["-0.1", "3.1", "10**400"],
    "INIT_STD": ["0", "-0.1", "1e31"],
    "MUTATION_STD": ["-1", "-1e-9", "1e31"],
    "FINAL_MUTATION_STD": ["-0.1", "1e31"],
}
WHOLE = [name for name in LIMITS if isinstance(getattr(script, name), int)]


def refused(name: str) -> list[str]:
    """Expressions that a constant refuses, by its kind."""
    default = getattr(script, name)
    if name in LIMITS:
        return NO_NUMBERS + LIMITS[name] + ["2.5", "np.float32(2.5)"] * (name in WHOLE)
    if isinstance(default, bool):
        return NO_SWITCHES
    return NO_FOLDERS if name == "RESUME" or name.endswith("_DIR") else NO_CHOICES


@pytest.mark.parametrize("name", NAMES)
def test_refused_in_the_file(name: str, main: Callable) -> None:
    """In one line that names the constant and the value, with nothing written."""
    bad = refused(name)
    assert len(bad) > 7
    for value in bad:
        code, out, error = main(module=load(edited(**{name: f"{name} = {value}"})))
        assert code == 2 and not out and one_line(error, f"{name} is ", "accepted is "), (value, code, error)
        assert os.listdir() == ["edited.py"], value


@pytest.mark.parametrize("name", NAMES)
def test_refused_as_a_flag(name: str, main: Callable) -> None:
    """A flag's text, as a shell passes it on: nothing in it is run."""
    flag, default = f"--{name.lower().replace('_', '-')}", getattr(script, name)
    if name in LIMITS:
        bad = [
            "nan",
            "inf",
            "-inf",
            "1e999",
            "true",
            "False",
            "None",
            "five",
            "",
            " ",
            "5 5",
            "[5]",
            "'5'",
            "5j",
            "(",
            "-",
        ]
        bad += ["__import__('os').mkdir('hacked')", "\n", *map(str, map(eval, LIMITS[name]))]
        bad += ["2.5"] * (name in WHOLE)
    elif isinstance(default, bool):
        bad = ["0", "1", "1.0", "2", "maybe", "yes", "None", "", "[True]", "not True", "nan"]
    elif name == "RESUME" or name.endswith("_DIR"):
        return  # any text is a folder
    else:
        bad = ["None", "", "0", "true", "other", "auto ", "['auto']", "nan"]
    for value in bad:
        code, out, error = main(f"{flag}={value}")
        assert code == 2 and not out and one_line(error, f"{name} is ", "accepted is "), (value, code, error)
        assert not os.listdir(), value


def test_a_refusal_says_what_is_accepted(main: Callable) -> None:
    for flag, words in {
        "archive-size=1": ("ARCHIVE_SIZE is 1,", "an integer from 2 to "),
        "alpha=3.1": ("ALPHA is 3.1,", "a number from 0.0 to 3.0"),
        "score=accuracy": ("SCORE is 'accuracy',", "'probability' | 'correct'"),
        "use-attraction=2": ("USE_ATTRACTION is 2,", "True | False"),
    }.items():
        code, _, error = main(f"--{flag}")
        assert code == 2 and one_line(error, *words), error
    code, _, error = main(module=load(edited(DATA_DIR="DATA_DIR = 5")))
    assert code == 2 and one_line(error, "DATA_DIR is 5,", "a folder")


def test_the_seeds_of_all_runs(main: Callable) -> None:
    """4294967295 is the last seed: a second run would have none."""
    for runs in (2, 3):
        code, out, error = main("--seed=4294967295", f"--runs={runs}")
        assert code == 2 and not out and one_line(error, "SEED", f"RUNS is {runs}", "4294967295"), error
    code, out, error = main(module=load(edited(SEED="SEED = 4294967294", RUNS="RUNS = 3")))
    assert code == 2 and not out and one_line(error, "SEED", "RUNS is 3"), error
    assert os.listdir() == ["edited.py"]
    constants, _ = script.parse_constants(["--seed=4294967294", "--runs=2"])
    assert (constants.SEED, constants.RUNS) == (2**32 - 2, 2)


# Flags

FLAGS = {
    "iterations": ("1e2", 100),
    "seed": ("0x10", 16),
    "test-every": ("1_000", 1000),
    "checkpoint-every": (" 5 ", 5),
    "runs": ("2.0", 2),
    "alpha": ("1", 1.0),
    "temperature": ("5e-1", 0.5),
    "init-std": (".5", 0.5),
    "use-crossover": ("FALSE", False),
    "use-split-point": ("false", False),
    "use-attraction": ("True", True),
    "score": ("CORRECT", "correct"),
    "output-dir": ("~/a 'b' #1", "{home}/a 'b' #1"),
    "data-dir": ("5", "5"),
}


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any form that a constant may have, joined by = or apart; what is not given stays as in the file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {n.upper().replace("-", "_"): value for n, (_, value) in FLAGS.items()}
    expected["OUTPUT_DIR"] = expected["OUTPUT_DIR"].format(home=tmp_path)
    joined = [f"--{name}={text}" for name, (text, _) in FLAGS.items()]
    apart = [part for name, (text, _) in FLAGS.items() for part in (f"--{name}", text)]
    for argv in (joined, apart):
        constants, given = script.parse_constants(argv)
        assert given == expected
        assert all(type(given[name]) is type(value) for name, value in expected.items())
        assert vars(constants) == {name: getattr(script, name) for name in NAMES} | expected
    constants, given = script.parse_constants([])
    assert vars(constants) == {name: getattr(script, name) for name in NAMES} and given == {}


def test_a_flag_overrides_an_edited_constant(data_dir: Path, main: Callable) -> None:
    module = load(edited(**QUICK | {"SEED": "SEED = 5", "ALPHA": "ALPHA = 0.5"}))
    code, _, error = main("--seed=6", module=module)
    assert code == 0, error
    assert recorded()["SEED"] == 6 and recorded()["ALPHA"] == 0.5


def test_unknown_flag(main: Callable) -> None:
    for flag in ("--iteration=5", "--ITERATIONS=5", "iterations=5", "--idx-files=1"):
        code, out, error = main(flag)
        assert code == 2 and not out and flag in error and not os.listdir()


def test_help_explains_every_constant(main: Callable) -> None:
    code, out, error = main("--help")
    text = " ".join(out.split())
    assert code == 0 and not error
    assert "'probability' | 'correct'" in text and "an integer from 2 to" in text
    for name in NAMES:
        assert f"--{name.lower().replace('_', '-')} " in text and f"(default: {getattr(script, name)!r})" in text
        first, last = PLACES[name]
        comment = "\n".join(TEXT.split("\n")[first:last]).rpartition("# ")[2]
        assert comment and " ".join(comment.split()) in text


# Arguments

BAD_ARGUMENTS = {
    "archive_size": [1, 0, -3, 2.5, math.nan, math.inf, True, None, "4", [4]],
    "score": ["accuracy", "", None, 1, True],
    "temperature": [0, -1.0, math.nan, math.inf, True, None, "1"],
    "alpha": [-0.1, 3.5, math.nan, math.inf, False, None, "1"],
    "init_std": [0, -0.1, math.nan, math.inf, True, None],
    "mutation_std": [-0.1, math.nan, math.inf, True, None, [0.1]],
    "final_mutation_std": [-0.1, math.nan, math.inf, True, None],
    "schedule": [-1, 2.5, math.nan, math.inf, True, None],
    "use_crossover": [0, 1, "yes", None, 0.0],
    "use_split_point": [0, 1, "yes", None, 0.0],
    "use_attraction": [0, 1, "yes", None, 0.0],
    "use_mirroring": [0, 1, "yes", None, 0.0],
    "eval_batch_size": [-1, 2.5, math.nan, True, None],
    "seed": [-1, 2**32, 2.5, math.nan, True, None, "1"],
}


def refusal(name: str, value: object) -> str:
    return rf"^{name} is {re.escape(repr(value))}, accepted is \S+"


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_of_m2n2(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises(ValueError, match=refusal(name, value)):
            make_m2n2(**{name: value})


def test_bad_arguments_elsewhere() -> None:
    m2n2 = make_m2n2()
    sizes = [0, -1, 2.5, math.nan, math.inf, True, None, "8", [8]]
    calls = {
        "input_dim": (sizes, MLP),
        "hidden_dim": (sizes, lambda value: MLP(8, value)),
        "output_dim": (sizes, lambda value: MLP(8, 8, value)),
        "data_dir": ([None, 5, True, b"data", ["data"]], MNISTDataModule),
        "image_size": ([*sizes[:-2], 29], lambda value: MNISTDataModule("data", value)),
        "batch_size": (sizes, lambda value: MNISTDataModule("data", 7, value)),
        "iterations": (sizes, m2n2.evolve),
        "test_every": (sizes, lambda value: m2n2.evolve(5, value)),
    }
    for name, (values, call) in calls.items():
        for value in values:
            with pytest.raises(ValueError, match=refusal(name, value)):
                call(value)
    assert m2n2.iteration == 0 and not m2n2.history and not os.listdir()


def test_arguments_in_other_types() -> None:
    """As in the file: whole floats, NumPy's numbers and paths."""
    m2n2 = make_m2n2(archive_size=np.int64(3), alpha=1, seed=7.0, use_crossover=np.bool_(False), score="CORRECT")
    m2n2.evolve(1e1, np.int32(5))
    assert [row["iteration"] for row in m2n2.history] == [5, 10] and m2n2.archive.shape[0] == 3
    assert MLP(np.int64(8), 8.0).hidden.weight.shape == (8, 8)
    assert MNISTDataModule(Path("~"), 7.0).image_size == 7


class Answers(nn.Module):
    """A model whose answer is that of a linear one, changed."""

    def __init__(self, change: Callable[[Tensor], Tensor], classes: int = 10) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(6, classes), change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.linear(images))


def tensors(examples: int = 40) -> dict[str, Tensor]:
    images, labels = torch.randn(examples, 6), torch.arange(examples) % 10
    names, test = ("train_images", "train_labels", "test_images", "test_labels"), (images[:20], labels[:20])
    return {name: tensor.clone() for name, tensor in zip(names, (images, labels, *test), strict=True)}


WRONG_TENSORS = {  # the argument, what becomes of it, what the message says
    "fewer labels": ("labels", lambda x: x[:-1], r"int64 \(\d+,\), accepted is"),
    "more labels": ("labels", lambda x: torch.cat([x, x]), r"int64 \(\d+,\), accepted is"),
    "one-hot labels": ("labels", nn.functional.one_hot, r"int64 \(\d+, 10\), accepted is"),
    "labels as a column": ("labels", lambda x: x[:, None], r"int64 \(\d+, 1\), accepted is"),
    "int32 labels": ("labels", Tensor.int, "int32.*, accepted is int64"),
    "uint8 labels": ("labels", Tensor.byte, "uint8.*, accepted is int64"),
    "float labels": ("labels", Tensor.float, "float32.*, accepted is int64"),
    "bool labels": ("labels", Tensor.bool, "bool.*, accepted is int64"),
    "negative labels": ("labels", lambda x: x - 1, "accepted is"),
    "integer images": ("images", Tensor.byte, "uint8.*, accepted is floating-point"),
    "bool images": ("images", Tensor.bool, "bool.*, accepted is floating-point"),
    "no images": ("images", lambda x: x[:0], r"\(0, 6\), accepted is"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("how", WRONG_TENSORS)
def test_wrong_tensors(how: str, split: str) -> None:
    kind, change, says = WRONG_TENSORS[how]
    given, name = tensors(), f"{split}_{kind}"
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=rf"^{name} .*{says}"):
        M2N2(MLP(6, 5), **given)


def test_no_example_at_all() -> None:
    for split in ("train", "test"):
        given = tensors()
        given |= {name: tensor[:0] for name, tensor in given.items() if split in name}
        with pytest.raises(ValueError, match=rf"^{split}_images .*\(0, 6\), accepted is"):
            M2N2(MLP(6, 5), **given)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_beyond_the_models_classes(split: str) -> None:
    """One of them is enough: an index beyond the logits would be read otherwise."""
    given = tensors()
    given[f"{split}_labels"][3] = 10
    with pytest.raises(ValueError, match=r"labels .*10, accepted is 0 to 9"):
        M2N2(MLP(6, 5), **given)
    M2N2(MLP(6, 5, 11), **given)


def test_test_images_unlike_the_training_images() -> None:
    for change in (lambda x: x[:, :5], lambda x: x[:, None], Tensor.double):
        given = tensors()
        given["test_images"] = change(given["test_images"])
        with pytest.raises(ValueError, match=r"^test_images is .*, accepted is"):
            M2N2(MLP(6, 5), **given)


@pytest.mark.parametrize("examples", [1, 2, 10, 40])
def test_a_model_that_answers_something_else(examples: int) -> None:
    """With as many images as there are classes, too."""
    changes = [lambda x: x[:, 0], lambda x: x[..., None], lambda x: x.mean(), lambda x: x.T[:3], lambda x: x[None]]
    for change in (*changes, lambda x: (x, x), lambda x: {"logits": x}):
        with pytest.raises(ValueError, match=r"^model answers \(.*\) to \d images?, accepted is"):
            M2N2(Answers(change), **tensors(examples))
    M2N2(Answers(lambda x: x), **tensors(examples)).evolve(2)


def test_initial_models_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"^initial_models .*44 parameters, accepted is .*\b95$"):
        M2N2(MLP(6, 5), **tensors(), initial_models=[MLP(6, 5), MLP(6, 2, 10)])
