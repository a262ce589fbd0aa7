"""The README: its snippets and flags are the script's, and its figures stand in the evidence."""

import re

import torch
from conftest import ROOT, RUN, SCRIPT, write_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("## Introduction")[0]
TABLE = README.partition("## Results")[2].partition("\n\n**")[0]


def figures(text: str) -> set[str]:
    """Accuracies, with their deviation if they have one."""
    return set(re.findall(r"\d\d\.\d+(?: ± \d+\.\d+)?(?= %|\*\*| \|| \()", text))


def test_the_snippets_run(tmp_path, main):
    """One after the other, beside a run of the defaults' model; with fewer iterations."""
    write_mnist(tmp_path / "data")
    code, _, error = main("--iterations=3", "--accelerator=cpu")
    assert code == 0 and (RUN / "best_model.pt").exists(), error
    blocks, names = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S), {}
    assert blocks
    for block in blocks:
        exec(re.sub(r"(evolve\((?:iterations=)?)[\d_]+", r"\g<1>20", block), names)
    assert names["merged"].iteration == 20 and 0 <= names["accuracy"] <= 1
    assert isinstance(names["model"], torch.nn.Module)


def test_the_flags_are_the_scripts(main):
    commands = re.findall(
        r"m2n2_mnist\.py((?:\s+--[^`#\n]*)?)", README + SCRIPT.read_text(encoding="utf-8")
    )
    flags = {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)}
    _, help_text, _ = main("--help")
    assert len(flags) > 5 and flags <= set(re.findall(r"--[a-z-]+", help_text))


def test_what_it_claims_stands_in_the_evidence():
    """Accuracies and commands of the first screen and the table; the docstring has no others."""
    for part in (FIRST_SCREEN, TABLE):
        assert len(figures(part)) >= 2
        assert [claim for claim in figures(part) if claim not in RESULTS] == []
    commands = re.findall(r"`((?:OMP_NUM_THREADS=1 )?python [^`]+)`", TABLE)
    assert commands and all(command in RESULTS for command in commands)
    claims = figures(SCRIPT.read_text(encoding="utf-8").split('"""')[1])
    assert claims and claims <= figures(FIRST_SCREEN)


def test_its_links():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
