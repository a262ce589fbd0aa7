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
from conftest import SCRIPT, make_m2n2, run_script, small, write_mnist

import m2n2_mnist as script
from m2n2_mnist import M2N2, MLP, MNISTDataModule, checked

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


def edited(**lines: str) -> str:
    """The script with other lines for these constants; "" takes one away."""
    rows = TEXT.split("\n")
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


def flag_of(name: str) -> str:
    return f"--{name.lower().replace('_', '-')}"


def shown(value: object) -> str:
    """What a refusal shows of a value: its repr in one line."""
    return " ".join(repr(value).split())


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


# --- Edits ---
EDITS = {  # the lines, and the values they stand for
    "no comment": ({"SEED": "SEED = 7"}, {"SEED": 7}),
    "no space at all": ({"SEED": "SEED=7# seed"}, {"SEED": 7}),
    "tabs": ({"SEED": "SEED\t=\t7\t# seed"}, {"SEED": 7}),
    "a semicolon": ({"SEED": "SEED = 7;"}, {"SEED": 7}),
    "own comment": ({"SEED": "SEED = 7  # [0, 9] lucky | (default: 3) {x} \\ 'it' 💡"}, {"SEED": 7}),
    "percent in a comment": ({"ALPHA": "ALPHA = 0.5  # 50 % of it, %s, %(prog)s, 100%"}, {"ALPHA": 0.5}),
    "comment above": ({"SEED": "# SEED = 3  # an older one\nSEED = 7"}, {"SEED": 7}),
    "empty comment": ({"SEED": "SEED = 7  #"}, {"SEED": 7}),
    "parentheses": ({"SEED": "SEED = (\n    3  # three\n    + 4\n)  # seven"}, {"SEED": 7}),
    "backslash": ({"SEED": "SEED = \\\n    7"}, {"SEED": 7}),
    "annotated": ({"SEED": "SEED: int = 7", "SCORE": "SCORE: str = 'correct'"}, {"SEED": 7, "SCORE": "correct"}),
    "computed": ({"ITERATIONS": "ITERATIONS = 8", "TEST_EVERY": "TEST_EVERY = ITERATIONS // 4"}, {"TEST_EVERY": 2}),
    "computed bool": ({"USE_ATTRACTION": "USE_ATTRACTION = ALPHA > 3"}, {"USE_ATTRACTION": False}),
    "of the environment": ({"SEED": "SEED = os.environ['MINE']"}, {"SEED": 7}),
    "f-string": ({"OUTPUT_DIR": 'OUTPUT_DIR = f"runs-{SEED}"'}, {"OUTPUT_DIR": "runs-42"}),
    "two in one line": ({"SEED": "SEED = 7; ALPHA = 0.5  # two", "ALPHA": ""}, {"SEED": 7, "ALPHA": 0.5}),
    "a tuple": ({"SEED": "SEED, ALPHA = 7, 0.5", "ALPHA": ""}, {"SEED": 7, "ALPHA": 0.5}),
    "chained": ({"SEED": "SEED = RUNS = 3", "RUNS": ""}, {"SEED": 3, "RUNS": 3}),
    "conditional": ({"SEED": "if os.name:\n    SEED = 7\nelse:\n    SEED = 8"}, {"SEED": 7}),
    "of a function": ({"SEED": "def mine():\n    return 7\n\n\nSEED = mine()"}, {"SEED": 7}),
    "set again": ({"SEED": "SEED = 3\nSEED += 4"}, {"SEED": 7}),
    "own constants": ({"SEED": "MINE = [1, None]\nBATCH_SIZE = 'x'\nSEED = 7"}, {"SEED": 7}),
    "whole floats": ({"ITERATIONS": "ITERATIONS = 1e1", "SEED": "SEED = 7.0"}, {"ITERATIONS": 10, "SEED": 7}),
    "hexadecimal": ({"SEED": "SEED = 0xF_F", "ALPHA": "ALPHA = 0.2_5"}, {"SEED": 255, "ALPHA": 0.25}),
    "text": (
        {"SEED": "SEED = '5'", "ALPHA": "ALPHA = '0.5'", "USE_CROSSOVER": "USE_CROSSOVER = 'false'"},
        {"SEED": 5, "ALPHA": 0.5, "USE_CROSSOVER": False},
    ),
    "NumPy's": (
        {"SEED": "SEED = np.arange(9)[8]", "ALPHA": "ALPHA = np.float32(0.5)", "DESKEW": "DESKEW = np.bool_(False)"},
        {"SEED": 8, "ALPHA": 0.5, "DESKEW": False},
    ),
    "a Path": ({"OUTPUT_DIR": "OUTPUT_DIR = Path('~', 'mine')"}, {"OUTPUT_DIR": "{home}/mine"}),
    "a string with #": ({"OUTPUT_DIR": 'OUTPUT_DIR = "run #1 %s"  # the first'}, {"OUTPUT_DIR": "run #1 %s"}),
    "three quotes": ({"OUTPUT_DIR": 'OUTPUT_DIR = """mine"""'}, {"OUTPUT_DIR": "mine"}),
    "capitals": ({"SCORE": "SCORE = 'Correct'", "DATASET": "DATASET = 'mnist'"}, {"SCORE": "correct"}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_that_is_python(edit: str, tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants take the value, in their own plain type, and --help goes on explaining them all."""
    monkeypatch.setenv("MINE", "7")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines, expected = EDITS[edit]
    module = load(edited(**lines))
    constants, given = module.parse_constants([])
    expected = {n: v.format(home=tmp_path / "home") if isinstance(v, str) else v for n, v in expected.items()}
    assert given == {} and {name: getattr(constants, name) for name in expected} == expected
    for name, value in vars(constants).items():
        assert type(value) is type(getattr(script, name)), name
    code, out, _ = main("--help", module=module)
    assert code == 0 and all(f"{flag_of(name)} " in out for name in NAMES)


@pytest.mark.parametrize(
    "change",
    [without_comments, in_reverse, lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text],
    ids=["no comments", "another order", "Windows line ends", "byte order mark"],
)
def test_the_constants_whole_block(change: Callable[[str], str], data_dir: Path, main: Callable) -> None:
    """What is said about a constant, and where it stands, is for its reader alone."""
    text = edited(**QUICK)
    changed = load(change(text))
    assert change(text) != text
    code, out, error = main(module=changed)
    assert code == 0 and "Evolution finished." in out, error
    assert recorded() == vars(load(text).parse_constants([])[0])
    code, out, _ = main("--help", module=changed)
    assert code == 0 and all(f"{flag_of(name)} " in out for name in NAMES)


def test_an_edited_file_as_a_process(data_dir: Path) -> None:
    """Many edits and no comments at all, as a user runs it: nothing here hangs on how the tests load it."""
    lines = {
        "SEED": "SEED = '7'",
        "ITERATIONS": "ITERATIONS = 1e1",
        "TEST_EVERY": "TEST_EVERY = ITERATIONS // 5",
        "OUTPUT_DIR": "OUTPUT_DIR = Path('my runs #1')",
        "ALPHA": "ALPHA: float = (\n    0.5\n)",
    }
    Path("edited.py").write_text(without_comments(edited(**QUICK | lines)), encoding="utf-8")
    done = run_script(path=Path("edited.py"))
    assert done.returncode == 0 and "Evolution finished." in done.stdout, done.stderr
    expected = {"SEED": 7, "ITERATIONS": 10, "TEST_EVERY": 2, "OUTPUT_DIR": "my runs #1", "ALPHA": 0.5}
    assert expected.items() <= recorded().items()


@pytest.mark.usefixtures("no_figure")
def test_every_constant_reaches_what_it_is_for(main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the algorithm become attributes of the M2N2, those of the data of its module; each USE_ is its own."""
    made, prepared = [], []

    class Recorded(MNISTDataModule):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            prepared.append(self)

    def evolve(m2n2: M2N2, iterations: int, test_every: int, after_child: Callable) -> None:
        made.append(m2n2)
        assert (iterations, test_every) == (9, 4)

    monkeypatch.setattr(script, "MNISTDataModule", Recorded)
    monkeypatch.setattr(script.M2N2, "evolve", evolve)
    write_mnist(Path("images"), dataset="KMNIST")
    values = {"archive_size": 3, "score": "correct", "temperature": 2.5, "alpha": 0.25, "init_std": 0.125}
    values |= {"mutation_std": 0.5, "final_mutation_std": 0.75, "prior_std": 0.875, "seed": 5}
    data = {"data_dir": "images", "dataset": "KMNIST", "crop_size": 21, "image_size": 5}
    run = {"iterations": 9, "test_every": 4, "hidden_dim": 8, "output_dir": "out"}
    switches = [name.lower() for name in NAMES if name.startswith("USE_")]
    for number, switch in enumerate(switches):
        deskew = number % 2 == 0
        code, _, error = main(*small(**values, **data, **run, deskew=deskew, **{switch: "false"}))
        assert code == 0, error
        m2n2, module = made.pop(), prepared.pop()
        assert {name: getattr(m2n2, name) for name in values} == values
        assert {name: getattr(m2n2, name) for name in switches} == {name: name != switch for name in switches}
        assert {name: getattr(module, name) for name in data} == data and module.deskew == deskew
        assert m2n2.schedule == 9 and m2n2.archive.shape == (3, 25 * 8 + 8 + 8 * 10 + 10)
        assert m2n2._random["generator"].initial_seed() == 5
        assert Path("out/m2n2_mnist", f"version_{number}").is_dir()
    elsewhere = {"runs", "resume", "accelerator", "deskew"}
    assert {*values, *data, *run, *switches} | elsewhere == {name.lower() for name in NAMES}


# --- What is accepted: the one place that decides ---
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, None, [5], (5,), {}, 5j, b"5", int, np.bool_(True)]
NO_NUMBERS += [np.float32("nan"), torch.tensor(5), np.eye(3), lambda: 5]
NO_NUMBERS += [
    "five",
    "",
    " ",
    "\n",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "true",
    "None",
    "5 5",
    "[5]",
    "'5'",
    "5j",
    "(",
    "-",
]
NO_NUMBERS += ["__import__('os').mkdir('hacked')"]
REFUSED = {  # by type; of a number, beside what is just outside its range
    float: NO_NUMBERS,
    int: [*NO_NUMBERS, 2.5, "2.5", np.float32(2.5)],
    bool: [0, 1, 1.0, None, [], [True], np.int64(1), math.nan, "0", "1", "no", "yes", "maybe", "None", "", "not True"],
    str: [None, True, 0, math.nan, b"auto", ["auto"], Path("auto"), "", "other", "None", "['auto']"],
    Path: [None, True, 0, 5, math.nan, b"data", ["data"], {}],
}
OUTSIDE = {
    "seed": [-1, "-1.0", 3 * 10**9 + 1, 1e300],
    "runs": [0, -1, 10**9 + 1],
    "iterations": [0, -5, 10**18],
    "test_every": [0, -1, 10**18],
    "crop_size": [0, 29],
    "image_size": [0, 29, "-7"],
    "hidden_dim": [0, -1, 10**12],
    "archive_size": [1, 0, -1, 10**9],
    "temperature": [0, -1.0, "1e-9", 1e9],
    "alpha": [-0.1, 3.1, 10**400],
    "init_std": [0, -0.1, 1e31],
    "mutation_std": [-1, -1e-9, 1e31],
    "final_mutation_std": [-0.1, 1e31],
    "prior_std": [-0.1, 1e31],
    "schedule": [-1, 10**18],
    "eval_batch_size": [-1, 10**18],
}


@pytest.mark.parametrize("name", script.ACCEPTED)
def test_refused(name: str) -> None:
    """In one line that names the argument, the value and what is accepted; nothing in a text is run."""
    kind = script.ACCEPTED[name][0]
    assert (name in OUTSIDE) == (kind in (int, float))
    for value in REFUSED[kind] + OUTSIDE.get(name, []):
        with pytest.raises(ValueError) as refusal:
            checked(name, value)
        pattern = rf"{name} is {re.escape(shown(value))}, accepted is [^\n]+"
        assert re.fullmatch(pattern, str(refusal.value)), value
    assert not os.listdir()


def test_a_refusal_says_what_is_accepted() -> None:
    for name, words in {
        "archive_size": "an integer from 2 to 1000000",
        "alpha": "a number from 0.0 to 3.0",
        "score": "'probability' | 'correct'",
        "use_attraction": "True | False",
        "data_dir": "a folder",
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} is None, accepted is {re.escape(words)}$"):
            checked(name, None)


TAKEN = [  # the argument, a value, what it stands for
    *[("seed", value, 7) for value in (7, 7.0, np.int64(7), np.uint8(7), np.float64(7), "7", " 7 ", "7.0", "+7")],
    *[("iterations", value, 1000) for value in (1e3, "1e3", "1_000", np.float32(1000))],
    *[("alpha", value, 1.0) for value in (1, 1.0, "1", "1.", "1e0", np.int64(1), np.float32(1))],
    *[("use_crossover", value, False) for value in (False, np.bool_(False), "False", "false", "FALSE", " false ")],
    *[("use_crossover", value, True) for value in (True, np.bool_(True), "True", "true")],
    *[("score", value, "correct") for value in ("correct", "CORRECT", np.str_("Correct"))],
    *[("output_dir", value, "{home}/a 'b' #1") for value in ("~/a 'b' #1", Path("~", "a 'b' #1"))],
    *[("data_dir", value, "5") for value in ("5", Path("5"), np.str_("5"))],
    ("resume", "", ""),
    ("seed", "3e9", 3 * 10**9),
    ("runs", 10**9, 10**9),
    ("mutation_std", 0, 0.0),
    ("prior_std", "0", 0.0),
]


@pytest.mark.parametrize(("name", "value", "expected"), TAKEN)
def test_taken(name: str, value: object, expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if isinstance(expected, str):
        expected = expected.format(home=tmp_path)
    found = checked(name, value)
    assert found == expected and type(found) is type(expected)


def test_the_seeds_of_all_runs_are_seeds() -> None:
    """The last seed of the most runs is still one of NumPy's."""
    last = checked("seed", script.ACCEPTED["seed"][2]) + checked("runs", script.ACCEPTED["runs"][2]) - 1
    np.random.RandomState(last)
    assert last < 2**32


# --- The doors: the file, a flag, an argument; two bad values each ---
def two_bad(name: str) -> list[object]:
    kind = script.ACCEPTED[name.lower()][0]
    of_kind = {bool: [2, "yes"], str: [None, "other"], Path: [None, 5]}
    return of_kind[kind] if kind in of_kind else [OUTSIDE[name.lower()][0], "five"]


@pytest.mark.parametrize("name", NAMES)
def test_refused_in_the_file_and_as_a_flag(name: str, main: Callable) -> None:
    """In one line that names the constant and the value, with nothing written; of a flag, any text is a folder."""
    for value in two_bad(name):
        code, out, error = main(module=load(edited(**{name: f"{name} = {value!r}"})))
        assert code == 2 and not out and one_line(error, f"{name} is {value!r}, accepted is "), (value, code, error)
        if script.ACCEPTED[name.lower()][0] is not Path:
            code, out, error = main(f"{flag_of(name)}={value}")
            assert code == 2 and not out and one_line(error, f"{name} is {shown(str(value))}, "), error
        assert os.listdir() == ["edited.py"], value


def test_bad_arguments() -> None:
    """Each by its name, of M2N2, MLP, MNISTDataModule and evolve."""
    m2n2 = make_m2n2()
    calls = {name: lambda name, value: make_m2n2(**{name: value}) for name in script.ACCEPTED.keys() & vars(m2n2)}
    assert len(calls) == 15
    calls |= dict.fromkeys(("data_dir", "dataset", "deskew"), lambda name, value: MNISTDataModule(**{name: value}))
    calls |= dict.fromkeys(("crop_size", "image_size"), calls["deskew"])
    calls["hidden_dim"] = lambda name, value: MLP(8, value)
    calls |= dict.fromkeys(("iterations", "test_every"), lambda n, v: m2n2.evolve(**{"iterations": 5} | {n: v}))
    for name, call in calls.items():
        for value in two_bad(name):
            with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}, accepted is \S+"):
                call(name, value)
    assert m2n2.iteration == 0 and not m2n2.history and not os.listdir()


def test_arguments_in_other_types() -> None:
    """As in the file: whole floats, NumPy's numbers, text and paths."""
    m2n2 = make_m2n2(archive_size=np.int64(3), alpha="1", seed=7.0, use_crossover=np.bool_(False), score="CORRECT")
    m2n2.evolve(1e1, np.int32(5))
    assert [row["iteration"] for row in m2n2.history] == [5, 10] and m2n2.score == "correct"
    assert MLP(8, 8.0).hidden.weight.shape == (8, 8) and MNISTDataModule(image_size="7").image_size == 7


# --- Flags and --help ---
def test_flags() -> None:
    """Joined by = or apart, in any form that a constant may have; what is not given stays as in the file."""
    texts = {"ITERATIONS": "1e2", "SEED": "1_000", "ALPHA": " .5 ", "USE_CROSSOVER": "FALSE", "SCORE": "CORRECT"}
    expected = {"ITERATIONS": 100, "SEED": 1000, "ALPHA": 0.5, "USE_CROSSOVER": False, "SCORE": "correct"}
    joined = [f"{flag_of(name)}={text}" for name, text in texts.items()]
    apart = [part for name, text in texts.items() for part in (flag_of(name), text)]
    for argv in (joined, apart):
        constants, given = script.parse_constants(argv)
        assert given == expected and vars(constants) == {name: getattr(script, name) for name in NAMES} | expected
    constants, given = load(edited(SEED="SEED = 5", ALPHA="ALPHA = 0.5")).parse_constants(["--seed=6"])
    assert given == {"SEED": 6} and (constants.SEED, constants.ALPHA) == (6, 0.5)  # over an edited one
    constants, given = script.parse_constants([])
    assert vars(constants) == {name: getattr(script, name) for name in NAMES} and given == {}


def test_unknown_flag(main: Callable) -> None:
    for flag in ("--iteration=5", "--ITERATIONS=5", "iterations=5", "--start=random", "--idx-files=1"):
        code, out, error = main(flag)
        assert code == 2 and not out and flag in error and not os.listdir()


def test_help_explains_every_constant(main: Callable) -> None:
    """By its comment, what it accepts and its default."""
    code, out, error = main("--help")
    text = " ".join(out.split())
    assert code == 0 and not error and script.__doc__.split("\n")[0] in out
    for name in NAMES:
        first, last = PLACES[name]
        comment = "\n".join(TEXT.split("\n")[first:last]).rpartition("# ")[2]
        words = f"{comment} [{script.in_words(name)}] (default: {getattr(script, name)!r})"
        assert comment and f"{flag_of(name)} " in text and " ".join(words.split()) in text
