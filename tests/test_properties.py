# SPDX-License-Identifier: Apache-2.0
"""The run with a random seed: which tests it includes, and that its seed gives the same examples again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

SAMPLE = """
import os
import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what}\\n")

@given(st.binary())
def test_property(raw):
    note(raw)

@pytest.mark.searched
def test_machine():
    class Machine(RuleBasedStateMachine):
        @rule(number=st.integers())
        def step(self, number):
            note(number)
    run_state_machine_as_test(Machine)

def test_plain():
    note("plain")
"""


def examples(folder: Path, seed: int) -> str:
    """The examples that the sample's tests saw in a run with this seed."""
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    (folder / "test_sample.py").write_text(SAMPLE)
    environment = {**os.environ, "NOTES": str(notes), "HYPOTHESIS_PROFILE": "random", "PYTHONPATH": str(ROOT)}
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--properties", f"--hypothesis-seed={seed}"]
    ini = ["-c", os.devnull, "--rootdir", str(folder), "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *ini, *options, str(folder / "test_sample.py")],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed, 1 deselected" in done.stdout, done.stdout
    return notes.read_text()


def test_a_seed_gives_the_same_examples_again(tmp_path: Path) -> None:
    """Only tests with Hypothesis run, state machines too; one seed gives the same run, another one a different run."""
    first = examples(tmp_path, 12345)
    assert examples(tmp_path, 12345) == first != examples(tmp_path, 54321)
    assert "plain" not in first and len(first.splitlines()) > 100


def test_the_script_prints_its_seed() -> None:
    """It is printed before the tests begin, so a run that hangs can be repeated as well."""
    text = (ROOT / "script" / "properties").read_text()
    assert text.index('echo "property tests with seed $seed') < text.index("-m pytest")
    assert "STEPS=(script/demo script/test script/properties)" in (ROOT / "script" / "fresh").read_text()
