# SPDX-License-Identifier: Apache-2.0
"""The harness's own page: it lists every module, and its examples run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, run

HARNESS = ROOT / "tests" / "harness"
PAGE = (HARNESS / "README.md").read_text(encoding="utf-8")


def test_the_page_lists_every_module() -> None:
    """The table and the folder have the same modules."""
    there = {path.stem for path in HARNESS.glob("*.py")} - {"__init__"}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == there


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example of the page runs in an empty folder, with its assertions."""
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[number], f"example {number}", "exec"), {"__name__": "example"})


def test_it_can_be_a_package_elsewhere(tmp_path: Path) -> None:
    """Under another name every module can be imported, and loads nothing of the tests, of vmm or of pytest."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    for path in HARNESS.glob("*.py"):
        (package / path.name).write_text(path.read_text(encoding="utf-8").replace("tests.harness", "elsewhere"))
    program = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]: importlib.import_module(f'elsewhere.{name}')\n"
        "wrong = {name.split('.')[0] for name in sys.modules} & {'tests', 'vmm', 'pytest'}\n"
        "assert not wrong, wrong"
    )
    run([sys.executable, "-c", program, str(tmp_path), *(path.stem for path in package.glob("*.py"))])
