"""The constants at the top, edited in any way that is Python; flags; what each of them refuses."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPT, as_module, flag_of, one_line, small, write_mnist

import m2n2_mnist as script
from m2n2_mnist import ACCEPTED, check, from_text

TEXT = SCRIPT.read_text(encoding="utf-8")
DEFAULTS = {name: getattr(script, name) for name in ACCEPTED}
LINES = {name: re.search(rf"^{name} = .*", TEXT, re.M)[0] for name in ACCEPTED}


def of(*kinds: type) -> list[str]:
    """The constants of these kinds."""
    return [name for name, (kind, *_) in ACCEPTED.items() if kind in kinds]


SWITCHES, FOLDERS = of(bool), of(Path)


def edited(code: str, *names: str) -> bytes:
    """The script with this code after its constants, from which the lines of these names go."""
    top, gap, rest = TEXT.partition("\n\n\n")
    for name in names:
        top = top.replace(f"\n{LINES[name]}", "")
    return f"{top}\n{code}{gap}{rest}".encode()


def test_the_defaults_are_those_of_the_readmes_figures():
    """Whoever means to change one here has the README's figures to measure anew."""
    measured = {"SEED": 42, "RUNS": 1, "ITERATIONS": 100_000, "TEST_EVERY": 1_000}
    measured |= {"DATASET": "MNIST", "DESKEW": True, "CROP_SIZE": 20, "IMAGE_SIZE": 8}
    measured |= {"HIDDEN_DIM": 128, "ARCHIVE_SIZE": 4, "SUBSET_SIZE": 10_000, "SUBSET_EVERY": 1_000}
    measured |= {"SCORE": "probability", "TEMPERATURE": 0.67, "ALPHA": 1.0, "INIT_STD": 0.01}
    measured |= {"MUTATION_STD": 0.005, "FINAL_MUTATION_STD": 0.001, "PRIOR_STD": 0.2}
    measured |= {"USE_CROSSOVER": True, "USE_SPLIT_POINT": True, "USE_ATTRACTION": True}
    assert measured | {name: DEFAULTS[name] for name in (*FOLDERS, "ACCELERATOR")} == DEFAULTS


# --- Edits ---
EDITS = {
    "odd comments": """
SEED=7# it's [0, 9] | (default: 3) {x} \\ 💡
ALPHA\t=\t1 / 2;  # 50 % of it, %s, %(prog)s, 100%
RUNS: int = 2  #
DATA_DIR = Path("my", "data"); ITERATIONS = 1e1
""",
    "no comments": "SEED, ALPHA, RUNS, DATA_DIR, ITERATIONS = 7, 0.5, 2, 'my/data', 10",
}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_that_is_python(edit, windows, main):
    """The constants take the value, in their own plain type; --help goes on explaining them all."""
    expected = {"SEED": 7, "ALPHA": 0.5, "RUNS": 2, "DATA_DIR": "my/data", "ITERATIONS": 10}
    text = edited(EDITS[edit], *expected)
    if windows:
        text = b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")
    module = as_module(text)
    constants, flags = module.parse_constants([])
    assert vars(constants) == DEFAULTS | expected and not flags
    assert all(type(getattr(constants, name)) is type(DEFAULTS[name]) for name in ACCEPTED)
    status, out, _ = main("--help", module=module)
    assert status == 0 and all(f"{flag_of(name)} " in out for name in ACCEPTED)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The constants, the data and the M2N2 of each run, which makes no child."""
    seen = []

    def run(constants: object, fabric: object, data: object, state: object) -> tuple:
        seen.append((constants, data, script.m2n2_of(constants, data.examples)))
        return [{"test_acc": 0.5}], Path("nowhere")

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "plot_evolution", lambda *_: None)
    return seen


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_constant_reaches_what_it_is_for(switch, main, ran, tmp_path):
    """M2N2 or the data's module, under its own name; each switch is one of its own."""
    write_mnist(tmp_path / "images", dataset="KMNIST")
    values = {"archive_size": 3, "subset_size": 90, "subset_every": 7, "seed": 5}
    values |= {"score": "correct", "temperature": 2.5, "alpha": 0.25, "init_std": 0.125}
    values |= {"mutation_std": 0.5, "final_mutation_std": 0.75, "prior_std": 0.875}
    prepared = {"data_dir": str(tmp_path / "images"), "dataset": "KMNIST"}
    prepared |= {"crop_size": 21, "image_size": 5}
    switches = {name.lower(): name != switch for name in SWITCHES}
    others = {"iterations": 9, "hidden_dim": 8}
    code, _, error = main(*small(**values, **prepared, **switches, **others))
    assert code == 0, error
    ((constants, data, m2n2),) = ran
    assert all(getattr(data, name) == prepared[name] for name in prepared)
    assert data.deskew == switches.pop("deskew")
    assert m2n2._generator.initial_seed() == values.pop("seed") == constants.SEED
    assert all(getattr(m2n2, name) == value for name, value in (values | switches).items())
    assert m2n2.schedule == 9 and m2n2.archive.shape == (3, 25 * 8 + 8 + 8 * 10 + 10)
    # The rest of them shows in what a run leaves, see test_run.py and test_resume.py.
    rest = {"seed", "deskew", "runs", "test_every", "output_dir", "resume", "accelerator"}
    assert {*values, *prepared, *switches, *others} | rest == {name.lower() for name in ACCEPTED}


# --- What is accepted: the one place that decides ---
NO_NUMBERS = [math.nan, math.inf, True, None, [5], 5j, "5", np.int64(5), np.float64(5), np.eye(3)]
NO_SWITCHES = [0, 1, 1.0, None, [True], np.bool_(True), "true", ""]
NO_CHOICES = [None, True, 0, b"MNIST", ["MNIST"], Path("MNIST"), "", "mnist", "Correct", "auto"]
NO_FOLDERS = [None, True, 5, b"data", ["data"]]
OUTSIDE = dict.fromkeys(("RUNS", "ITERATIONS", "TEST_EVERY"), (0, -1, 2.5, 10**9 + 1))
OUTSIDE |= {"SUBSET_EVERY": (0, 2.5, 10**9 + 1), "SUBSET_SIZE": (-1, 2.5, 10**9 + 1)}
OUTSIDE |= dict.fromkeys(("CROP_SIZE", "IMAGE_SIZE"), (0, 29, -7, 2.5))
OUTSIDE |= dict.fromkeys(("MUTATION_STD", "FINAL_MUTATION_STD", "PRIOR_STD"), (-1, -1e-9, 1e31))
OUTSIDE |= {"HIDDEN_DIM": (0, 2.5, 4_001), "ARCHIVE_SIZE": (1, 0, 2.5, 501)}
OUTSIDE |= {"SEED": (-1, -1.0, 2.5, 10**15 + 1, 1e300), "INIT_STD": (0, -0.1, 1e31)}
OUTSIDE |= {"TEMPERATURE": (0, -1.0, 1e-9, 1e9), "ALPHA": (-0.1, 3.1, 10**400)}
REFUSED = dict.fromkeys(of(int, float), NO_NUMBERS) | dict.fromkeys(of(str), NO_CHOICES)
REFUSED |= dict.fromkeys(SWITCHES, NO_SWITCHES) | dict.fromkeys(FOLDERS, NO_FOLDERS)


@pytest.mark.parametrize("name", ACCEPTED)
def test_refused(name, main):
    """In one line that names the constant, the value and what is accepted; no run begins."""
    for value in (*REFUSED[name], *OUTSIDE.get(name, ())):
        with pytest.raises(ValueError) as refusal:
            check(name, value)
        shown = re.escape(" ".join(repr(value).split()))  # an array's repr has several lines
        assert re.fullmatch(rf"{name} is {shown}, accepted is [^\n]+", str(refusal.value)), value
    code, out, error = main(module=as_module(edited(f"{name} = [5]")))
    assert code == 2 and not out and one_line(error, f"Error: {name} is [5], accepted is ")
    if name not in FOLDERS:  # any text is one
        code, out, error = main(f"{flag_of(name)}=other")
        assert code == 2 and not out and one_line(error, f"Error: {name} is 'other', accepted is ")
    assert os.listdir() == ["edited.py"]


def test_a_refusal_says_what_is_accepted():
    words = {"ARCHIVE_SIZE": "an integer from 2 to 500", "ALPHA": "a number from 0.0 to 3.0"}
    words |= {"SCORE": "'probability' or 'correct'", "USE_ATTRACTION": "True or False"}
    for name, accepted in (words | {"DATA_DIR": "a folder"}).items():
        with pytest.raises(ValueError, match=f"^{name} is None, accepted is {accepted}$"):
            check(name, None)


TAKEN = [  # the constant, the value it stands for, its other forms in the file, as a flag's text
    ("SEED", 7, [7.0], ["7", " 7 ", "7.0", "+7"]),
    ("ITERATIONS", 1000, [1e3], ["1e3", "1_000"]),
    ("ALPHA", 1.0, [1], ["1", "1.", "1e0"]),
    ("USE_CROSSOVER", False, [], ["False", "false", "FALSE"]),
    ("USE_CROSSOVER", True, [], ["True", "true"]),
    ("SCORE", "correct", [], ["correct"]),
    ("OUTPUT_DIR", os.path.expanduser("~/a 'b' #1"), [Path("~", "a 'b' #1")], ["~/a 'b' #1"]),
    ("DATA_DIR", "5", [Path("5")], ["5"]),
    ("RESUME", "", [], [""]),
]


@pytest.mark.parametrize(("name", "expected", "values", "texts"), TAKEN)
def test_taken(name, expected, values, texts):
    for value in [expected, *values, *(from_text(name, text) for text in texts)]:
        found = check(name, value)
        assert found == expected and type(found) is type(expected), value


FLAGS_REFUSED = {
    "--seed=nan": "SEED is nan",
    "--seed=1e999": "SEED is inf",
    "--seed=2.5": "SEED is 2.5",
    "--seed=": "SEED is ''",
    "--seed=0x7": "SEED is '0x7'",
    "--mutation-std=0.2": "PRIOR_STD is 0.2",
    "--final-mutation-std=0.5 --prior-std=0.4": "PRIOR_STD is 0.4",
}


@pytest.mark.parametrize("flags", FLAGS_REFUSED)
def test_flags_refused(flags, main):
    code, out, error = main(*flags.split())
    words = f"Error: {FLAGS_REFUSED[flags]}, accepted is "
    assert code == 2 and not out and one_line(error, words)


# --- Flags and --help ---
@pytest.mark.parametrize("flag", ["--iteration=5", "iterations=5"])
def test_unknown_flag(flag, main):
    code, out, error = main(flag)
    assert code == 2 and not out and flag in error and not os.listdir()


@pytest.mark.parametrize("as_text", [False, True])
def test_main_called_by_hand(as_text, ran, tmp_path):
    """With numbers, switches and paths in the list, or in one string; by = or apart."""
    folder = write_mnist(tmp_path / "data")
    argv = ["--data-dir", folder, "--seed", 7, "--alpha", 0.5, "--deskew", False]
    argv += ["--accelerator", "cpu"]
    if as_text:
        argv = f"--data-dir {folder} --seed 7  --alpha=0.5 --deskew false --accelerator=cpu"
    assert script.main(argv) is None
    ((constants, *_),) = ran
    expected = {"SEED": 7, "ALPHA": 0.5, "DESKEW": False, "DATA_DIR": str(folder)}
    assert vars(constants) == DEFAULTS | expected | {"ACCELERATOR": "cpu"}


def test_help_explains_every_constant(main):
    code, out, error = main("--help")
    text = " ".join(out.split())
    assert code == 0 and not error and script.__doc__.split("\n")[0] in out
    for name, value in DEFAULTS.items():
        comment = LINES[name].partition("# ")[2]
        words = f"{flag_of(name)} {name} {comment} [{script.accepted(name)}] (default: {value!r})"
        assert comment and " ".join(words.split()) in text, name
