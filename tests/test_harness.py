# SPDX-License-Identifier: Apache-2.0
"""The harness's own page: it lists every module, and its examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

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
