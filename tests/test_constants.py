"""The constants at the top of the file, edited in any way that is Python; flags and arguments; what each refuses."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, as_module, make_m2n2, one_line, small, write_mnist

import m2n2_mnist as script
from m2n2_mnist import MLP, MNISTDataModule, checked

TEXT = SCRIPT.read_text(encoding="utf-8")
NAMES = script.CONSTANTS
DEFAULTS = {name: getattr(script, name) for name in NAMES}
LINES = {name: re.search(rf"^{name} = .*", TEXT, re.M)[0] for name in NAMES}


def edited(code: str, *names: str) -> str:
    """The script with this code after the constants, from which the lines of these names are taken away."""
    top, gap, rest = TEXT.partition("\n\n\n")
    for name in names:
        top = top.replace(f"\n{LINES[name]}", "")
    return f"{top}\n{code}{gap}{rest}"


def flag_of(name: str) -> str:
    return f"--{name.lower().replace('_', '-')}"


# --- Edits ---
COMPUTED = """
def mine():
    return 3

if os.name:
    SEED = mine()
SEED += 4
RUNS = int(os.environ["MINE"])
USE_ATTRACTION = ALPHA > 3
OUTPUT_DIR = f"runs-{SEED}"
MINE = [1, None]
BATCH_SIZE = "x"
"""
EDITS = {  # the code, and the values that it stands for
    "other comments": (
        "SEED=7# it's [0, 9] | (default: 3) {x} \\ 💡\nALPHA\t=\t0.5;  # 50 % of it, %s, %(prog)s, 100%\nRUNS = 2  #",
        {"SEED": 7, "ALPHA": 0.5, "RUNS": 2},
    ),
    "several lines": ("SEED = (\n    3  # three\n    + 4\n)  # seven\nRUNS = \\\n    2", {"SEED": 7, "RUNS": 2}),
    "annotated": ("SEED: int = 7\nSCORE: str = 'correct'  # mine", {"SEED": 7, "SCORE": "correct"}),
    "several in a line": (
        "SEED, ALPHA = 7, 0.5; RUNS = TEST_EVERY = 2  # four",
        {"SEED": 7, "ALPHA": 0.5, "RUNS": 2, "TEST_EVERY": 2},
    ),
    "computed": (COMPUTED, {"SEED": 7, "RUNS": 2, "USE_ATTRACTION": False, "OUTPUT_DIR": "runs-7"}),
    "other numbers": ("ITERATIONS = 1e1\nSEED = 0xF_F\nALPHA = 1", {"ITERATIONS": 10, "SEED": 255, "ALPHA": 1.0}),
    "text": (
        "SEED = '5'\nALPHA = '0.5'\nDESKEW = 'false'\nSCORE = 'Correct'\nOUTPUT_DIR = 'run #1 %s'",
        {"SEED": 5, "ALPHA": 0.5, "DESKEW": False, "SCORE": "correct", "OUTPUT_DIR": "run #1 %s"},
    ),
    "NumPy's and a Path": (
        "SEED = np.arange(9)[8]\nALPHA = np.float32(0.5)\nDESKEW = np.bool_(False)\nDATA_DIR = Path('my', 'data')",
        {"SEED": 8, "ALPHA": 0.5, "DESKEW": False, "DATA_DIR": "my/data"},
    ),
    "no comments": (re.sub(" *#.*", "", "\n".join(LINES.values())), DEFAULTS),
    "another order": ("\n".join(reversed(LINES.values())), DEFAULTS),
}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_that_is_python(edit: str, windows: bool, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants take the value, in their own plain type; --help goes on explaining them all."""
    monkeypatch.setenv("MINE", "2")
    code, expected = EDITS[edit]
    text = edited(code, *expected)
    if windows:
        text = "\ufeff" + text.replace("\n", "\r\n")
    module = as_module(text.encode())
    constants, flags = module.parse_constants([])
    assert vars(constants) == DEFAULTS | expected and not flags
    assert all(type(getattr(constants, name)) is type(value) for name, value in DEFAULTS.items())
    status, out, _ = main("--help", module=module)
    assert status == 0 and all(f"{flag_of(name)} " in out for name in NAMES)


@pytest.mark.usefixtures("no_figure")
def test_every_constant_reaches_what_it_is_for(main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the algorithm become attributes of the M2N2, those of the data of its module; each USE_ is its own."""
    seen, evolved, run = [], [], script.run

    def watched(constants: object, fabric: object, data: MNISTDataModule, *rest: object) -> tuple:
        seen.append((data, *run(constants, fabric, data, *rest)))
        return seen[-1][1:]

    monkeypatch.setattr(script, "run", watched)
    monkeypatch.setattr(script.M2N2, "evolve", lambda m2n2, *arguments: evolved.append(arguments[:2]))
    write_mnist(Path("images"), dataset="KMNIST")
    values = {"archive_size": 3, "score": "correct", "temperature": 2.5, "alpha": 0.25, "init_std": 0.125}
    values |= {"mutation_std": 0.5, "final_mutation_std": 0.75, "prior_std": 0.875, "seed": 5}
    prepared = {"data_dir": "images", "dataset": "KMNIST", "crop_size": 21, "image_size": 5}
    others = {"iterations": 9, "test_every": 4, "hidden_dim": 8, "output_dir": "out"}
    switches = [name.lower() for name in NAMES if name.startswith("USE_")]
    for number, switch in enumerate(switches):
        deskew = number % 2 == 0
        code, _, error = main(*small(**values, **prepared, **others, deskew=deskew, **{switch: False}))
        assert code == 0, error
        data, m2n2, folder = seen.pop()
        assert {name: getattr(m2n2, name) for name in values} == values
        assert {name: getattr(m2n2, name) for name in switches} == {name: name != switch for name in switches}
        assert {name: getattr(data, name) for name in prepared} == prepared and data.deskew == deskew
        assert evolved.pop() == (9, 4) and m2n2.schedule == 9
        assert m2n2.archive.shape == (3, 25 * 8 + 8 + 8 * 10 + 10)
        assert m2n2._generator.initial_seed() == 5
        assert folder == Path("out/m2n2_mnist", f"version_{number}")
    elsewhere = {"runs", "resume", "accelerator", "deskew"}
    assert {*values, *prepared, *others, *switches} | elsewhere == {name.lower() for name in NAMES}


# --- What is accepted: the one place that decides ---
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, None, [5], (5,), {}, 5j, b"5", int, np.bool_(True)]
NO_NUMBERS += [np.float32("nan"), torch.tensor(5), np.eye(3), lambda: 5, "__import__('os').mkdir('hacked')"]
NO_NUMBERS += ["", " ", "\n", "five", "nan", "inf", "-inf", "1e999", "true", "None", "5 5"]
NO_NUMBERS += ["[5]", "'5'", "5j", "(", "-"]
REFUSED = {  # by type; of a number, beside what is just outside its range
    float: NO_NUMBERS,
    int: [*NO_NUMBERS, 2.5, "2.5", np.float32(2.5)],
    bool: [0, 1, 1.0, None, [], [True], np.int64(1), math.nan, "0", "1", "no", "yes", "maybe", "None", "", "not True"],
    str: [None, True, 0, math.nan, b"auto", ["auto"], Path("auto"), "", "other", "None", "['auto']"],
    Path: [None, True, 0, 5, math.nan, b"data", ["data"], {}],
}
OUTSIDE = dict.fromkeys(("runs", "iterations", "test_every"), (0, -1, 10**9 + 1, 10**18))
OUTSIDE |= dict.fromkeys(("schedule", "eval_batch_size"), (-1, 10**9 + 1))
OUTSIDE |= dict.fromkeys(("crop_size", "image_size"), (0, 29, "-7"))
OUTSIDE |= dict.fromkeys(("mutation_std", "final_mutation_std", "prior_std"), (-1, -1e-9, 1e31))
OUTSIDE |= {"hidden_dim": (0, -1, 10**5 + 1), "init_std": (0, -0.1, 1e31), "seed": (-1, "-1.0", 10**9 + 1, 1e300)}
OUTSIDE |= {"archive_size": (1, 0, -1, 10**4 + 1), "temperature": (0, -1.0, "1e-9", 1e9), "alpha": (-0.1, 3.1, 10**400)}


@pytest.mark.parametrize("name", script.ACCEPTED)
def test_refused(name: str) -> None:
    """In one line that names the argument, the value and what is accepted; nothing in a text is run."""
    kind = script.ACCEPTED[name][0]
    assert (name in OUTSIDE) == (kind in (int, float))
    for value in (*REFUSED[kind], *OUTSIDE.get(name, ())):
        with pytest.raises(ValueError) as refusal:
            checked(name, value)
        shown = " ".join(repr(value).split())  # an array's repr has several lines
        assert re.fullmatch(rf"{name} is {re.escape(shown)}, accepted is [^\n]+", str(refusal.value)), value
    assert not os.listdir()


def test_a_refusal_says_what_is_accepted() -> None:
    for name, words in {
        "archive_size": "an integer from 2 to 10000",
        "alpha": "a number from 0.0 to 3.0",
        "score": "'probability' | 'correct'",
        "use_attraction": "True | False",
        "data_dir": "a folder",
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} is None, accepted is {re.escape(words)}$"):
            checked(name, None)


TAKEN = [  # the argument, the value that it stands for, in which forms
    ("seed", 7, [7, 7.0, np.int64(7), np.uint8(7), np.float64(7), "7", " 7 ", "7.0", "+7"]),
    ("seed", 10**9, [1e9, "1e9"]),
    ("iterations", 1000, [1e3, "1e3", "1_000", np.float32(1000)]),
    ("alpha", 1.0, [1, 1.0, "1", "1.", "1e0", np.int64(1), np.float32(1)]),
    ("mutation_std", 0.0, [0, "0"]),
    ("prior_std", 0.0, [0, "0"]),
    ("use_crossover", False, [False, np.bool_(False), "False", "false", "FALSE", " false "]),
    ("use_crossover", True, [True, np.bool_(True), "True", "true"]),
    ("score", "correct", ["correct", "CORRECT", np.str_("Correct")]),
    ("output_dir", os.path.expanduser("~/a 'b' #1"), ["~/a 'b' #1", Path("~", "a 'b' #1")]),
    ("data_dir", "5", ["5", Path("5"), np.str_("5")]),
    ("resume", "", [""]),
]


@pytest.mark.parametrize(("name", "expected", "values"), TAKEN)
def test_taken(name: str, expected: object, values: list[object]) -> None:
    for value in values:
        found = checked(name, value)
        assert found == expected and type(found) is type(expected), value


# --- The doors: the file, a flag, an argument; two bad values each ---
@pytest.mark.parametrize("name", NAMES)
def test_refused_in_the_file_and_as_a_flag(name: str, main: Callable) -> None:
    """In one line that names the constant and the value, with nothing written; of a flag, any text is a folder."""
    for value in (None, b"other", [5]):
        code, out, error = main(module=as_module(edited(f"{name} = {value!r}").encode()))
        assert code == 2 and not out and one_line(error, f"{name} is {value!r}, accepted is "), (value, code, error)
    for text in () if script.ACCEPTED[name.lower()][0] is Path else ("other", ""):
        code, out, error = main(f"{flag_of(name)}={text}")
        assert code == 2 and not out and one_line(error, f"{name} is {text!r}, accepted is "), (text, code, error)
    assert os.listdir() == ["edited.py"]


def test_the_last_runs_seed_is_one_too(main: Callable) -> None:
    code, out, error = main("--seed=1e9", "--runs=2")
    assert code == 2 and not out and one_line(error, "SEED is 1000000001, accepted is ")


def test_bad_arguments() -> None:
    """Each by its name, of M2N2, MLP, MNISTDataModule and evolve."""
    m2n2 = make_m2n2()
    calls = {name: lambda name, value: make_m2n2(**{name: value}) for name in script.ACCEPTED.keys() & vars(m2n2)}
    assert len(calls) == 15
    for name in ("data_dir", "dataset", "deskew", "crop_size", "image_size"):
        calls[name] = lambda name, value: MNISTDataModule(**{name: value})
    calls["hidden_dim"] = lambda name, value: MLP(8, value)
    calls["iterations"] = lambda name, value: m2n2.evolve(value)
    calls["test_every"] = lambda name, value: m2n2.evolve(5, value)
    for name, call in calls.items():
        for value in (None, b"other"):
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
    """Joined by = or apart, in any form that a constant may have; they go before an edited one."""
    texts = {"ITERATIONS": "1e2", "SEED": "1_000", "ALPHA": " .5 ", "USE_CROSSOVER": "FALSE", "SCORE": "CORRECT"}
    expected = {"ITERATIONS": 100, "SEED": 1000, "ALPHA": 0.5, "USE_CROSSOVER": False, "SCORE": "correct"}
    module = as_module(edited("SEED = 5; RUNS = 6").encode())
    joined = [f"{flag_of(name)}={text}" for name, text in texts.items()]
    apart = [part for name, text in texts.items() for part in (flag_of(name), text)]
    for argv in (joined, apart):
        constants, given = module.parse_constants(argv)
        assert given == expected and vars(constants) == DEFAULTS | {"RUNS": 6} | expected


def test_unknown_flag(main: Callable) -> None:
    for flag in ("--iteration=5", "--ITERATIONS=5", "iterations=5"):
        code, out, error = main(flag)
        assert code == 2 and not out and flag in error and not os.listdir()


def test_help_explains_every_constant(main: Callable) -> None:
    """By its comment, what it accepts and its default."""
    code, out, error = main("--help")
    text = " ".join(out.split())
    assert code == 0 and not error and script.__doc__.split("\n")[0] in out
    for name, value in DEFAULTS.items():
        comment = LINES[name].partition("# ")[2]
        words = f"{flag_of(name)} {name} {comment} [{script.in_words(name)}] (default: {value!r})"
        assert comment and " ".join(words.split()) in text, name
