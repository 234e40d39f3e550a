# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from tests.doc_commands import blocks, pages
from tests.test_layering import FILE_ROOMS, LAYERS, VMM_LAYERS
from vhdkit.formats.vhd.layout import STRUCTURES
from vhdkit.formats.vhdx import layout as vhdx_layout

ROOT = Path(__file__).parent.parent
INVARIANT = re.compile(r"INV-[A-Z-]*[A-Z]")


def table_of(text: str, heading: str) -> list[tuple[str, int, int]]:
    """(field, offset, size) rows of the table under a heading."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.MULTILINE)
    return [(name, int(offset), int(size)) for offset, size, name in rows]


def docstrings_of_tests() -> str:
    """All docstrings of all test functions, methods and modules."""
    found = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
                found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


def test_offset_tables_agree_with_the_layout() -> None:
    """Every structure has a table in the page of its format with the same fields, offsets and sizes as layout.py."""
    for page, structures in (("formats-vhd.md", STRUCTURES), ("formats-vhdx.md", vhdx_layout.STRUCTURES)):
        text = (ROOT / "docs" / page).read_text()
        for name, fields in structures.items():
            assert table_of(text, name) == [tuple(field) for field in fields], name


def test_changelog_has_every_release_with_its_date() -> None:
    """The unreleased changes come first; each release below has its date, the newest first, down to 0.1.0."""
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Next (unreleased)"
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", head) for head in heads[1:]]
    assert all(releases), heads
    found = [([int(part) for part in one[1].split(".")], one[2]) for one in releases if one]
    assert found == sorted(found, reverse=True) and found[-1][0] == [0, 1, 0]


def test_every_fenced_block_has_its_language() -> None:
    """Commands are only in blocks of commands, which tests/test_doc_commands.py runs.

    Use ```console (`$ ` and the output), ```sh (only commands), ```python, or, for reading, ```text.
    """
    command = re.compile(r"^(\$ )?(vhdkit|vmm|script/\w+|pip|nbdkit) [a-z]")
    for page in pages():
        for block in blocks(page):
            where = f"{page}:{block.line}"
            assert block.language, f"{where}: the block needs a language"
            if block.language in ("console", "console similar", "sh", "python"):
                assert block.language == "python" or list(block.commands()), f"{where}: the block has no command"
            elif not block.text.startswith("3. The newest layer's"):  # the demo's own output (tests/test_demo.py)
                typed = [line for line in block.text.splitlines() if command.match(line) and "──" not in line]
                assert not typed, f"{where}: commands in a block for reading: {typed}"


def test_invariants_are_listed_and_tested() -> None:
    """The invariants of invariants.md and those named in test docstrings are the same set."""
    listed = set(re.findall(r"^\| (INV-[A-Z-]+) \|", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE))
    tested = set(INVARIANT.findall(docstrings_of_tests()))
    assert listed == tested


def test_hacking_lists_what_the_rules_allow() -> None:
    """HACKING names the rooms that may touch files, as test_layering does, and pytest's markers."""
    text = (ROOT / "docs/HACKING.md").read_text()
    rooms = text.split("- Only `store.py`", 1)[1].split(" touch files", 1)[0]
    assert {"store.py", *re.findall(r"`(\w+\.py)`", rooms)} == {Path(room).name for room in FILE_ROOMS}
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    listed = text.split("Markers: ", 1)[1].split(".", 1)[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {marker.split(":")[0] for marker in markers}


def test_no_row_is_repeated() -> None:
    """Each invariant has one row, and no line of a table or of the changelog is repeated."""
    rows = re.findall(r"^\| (INV-[A-Z-]+) \|", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(set(rows))
    for name in ("docs/architecture.md", "docs/invariants.md", "CHANGELOG.md"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line.startswith(("| `", "- "))]
        assert not {line for line in lines if lines.count(line) > 1}, name


def test_architecture_shows_the_layers_that_are_tested() -> None:
    """The order of the rooms in architecture.md is that of test_layering."""
    pages = (ROOT / "docs/architecture.md").read_text().split("```text\n")
    for drawn, layers, package in ((pages[1], LAYERS, "vhdkit"), (pages[2], VMM_LAYERS, "vmm")):
        rooms = [[one.removeprefix(f"{package}.") for one in row if "__main__" not in one] for row in layers]
        rooms[-1].remove(package)
        assert [row.split() for row in drawn.split("```")[0].split("<")] == rooms


def test_invariants_named_in_the_code_are_listed() -> None:
    """Every invariant named in a module is on the page."""
    listed = set(INVARIANT.findall((ROOT / "docs/invariants.md").read_text()))
    for path in (ROOT / "vhdkit").rglob("*.py"):
        assert set(INVARIANT.findall(path.read_text())) <= listed, path


def rooms_of_architecture() -> list[str]:
    """The modules named in the tables of architecture.md: "vmm/store/registry"; whole packages as well."""
    found = []
    package = "vhdkit"
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if heading := re.match(r"\*\*`(vmm/[a-z_/]+)`\*\*: |The rooms of `(vmm\.net)`", line):
            package = (heading[1] or heading[2]).replace(".", "/")
        if line.startswith("| `"):
            folder = ""
            for name in re.findall(r"`([a-z0-9_/]+)`", line.split(" | ")[0]):
                folder = name.rpartition("/")[0] or folder
                found.append("/".join(filter(None, (package, folder, name.rpartition("/")[2]))))
    return found


def test_architecture_names_every_room() -> None:
    """The tables of architecture.md name each module of both packages once, and only existing ones."""
    tree = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for package in ("vhdkit", "vmm")
        for path in (ROOT / package).rglob("*.py")
        if path.stem not in ("__init__", "__main__") and path.relative_to(ROOT).parts[1] != "cli"
    }
    named = rooms_of_architecture()
    assert sorted(tree - set(named)) == []
    assert [one for one in named if one not in tree and not (ROOT / one).is_dir()] == []
    assert sorted({one for one in named if named.count(one) > 1}) == []


def nbd_tests() -> dict[str, str]:
    """Docstrings of the tests of the NBD server, by `file::test`."""
    found = {}
    paths = [*(ROOT / "tests/vhdkit/serve").rglob("test_*.py"), *(ROOT / "tests/interop").glob("test_nbd_*.py")]
    for path in [*paths, ROOT / "tests/test_fuzz_replay.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{path.stem}::{node.name}"] = ast.get_docstring(node) or ""
    return found


def rows_named(text: str) -> set[int]:
    """The checklist's rows that a docstring names: "Row 9", "Rows 9, 13 and 14"."""
    lists = re.findall(r"\bRows? (\d+(?:(?:, | and )\d+)*)", text)
    return {int(number) for numbers in lists for number in re.findall(r"\d+", numbers)}


def test_nbd_support_names_tests_that_exist() -> None:
    """Each row of nbd-support.md names existing tests that name the row; each row that a test names is on the page."""
    text = (ROOT / "docs/nbd-support.md").read_text()
    tests = nbd_tests()
    named = re.findall(r"`(test_\w+::test_\w+)`", text)
    assert not set(named) - set(tests)
    rows = {int(number): line for number, line in re.findall(r"^\| (\d+) (\|.*)$", text, re.MULTILINE)}
    assert sorted(rows) == list(range(1, 43))
    for number, line in rows.items():
        names = re.findall(r"`(test_\w+::test_\w+)`", line)
        assert names, f"row {number} has no test"
        for name in names:
            assert number in rows_named(tests[name]), f"{name} does not name row {number}"
    assert {number for text in tests.values() for number in rows_named(text)} <= set(rows)
    assert rows_named("Rows 9, 13 and 14: x. Row 2") == {2, 9, 13, 14}
