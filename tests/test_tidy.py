# SPDX-License-Identifier: Apache-2.0
"""Style that a program can judge: how files begin, words, sizes, left-over notes, tests mirroring the code.

Every rule is a function from (path, text) to complaints, which is run over the whole project and, to prove that it can
fail, over one bad text each. Words that would make this file complain about itself are composed of two.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.sources import nodes_of, tree_of
from tests.support import CODE_FOLDERS, ROOT, project_text_files, python_files

SPDX_LINE = "# SPDX-License-Identifier: Apache-2.0"
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 70
# What is longer than the limits all the same: "path" or "path:function", how long it may be, and why it is in one
# piece. This list may only shrink: what became shorter by more than SLACK_LINES gets a new number, and what is within
# the limit is dropped. No module of the packages is in it.
SLACK_LINES = 20
OVERSIZE: dict[str, tuple[int, str]] = {
    "tests/harness/stores.py": (470, "the stores share their sectors, and each builds on the one before"),
    "tests/soak_snapshots.py": (470, "one driver: its steps, how they are killed, and what must hold afterwards"),
    "tests/test_error_lines.py": (
        560,
        "one list of the errors of both programs, and one set of rules for them",
    ),
    "tests/test_layering.py": (600, "the tables of rooms, the rules over them, and a bad line for each"),
    "tests/test_third_format.py": (580, "one made-up format through every verb: the proof that its contract is whole"),
    "tests/vhdkit/chain/names/test_children.py": (580, "one farm of images, through every way to find a child"),
    "tests/vhdkit/chain/names/test_opening.py": (
        580,
        "all names by which a child finds a parent, on one set of files",
    ),
    "tests/vhdkit/serve/control/test_operations.py": (545, "one served set of disks, through every operation on it"),
    "tests/vhdkit/test_disk_strangers.py": (585, "one disk in every kind of program and buffer that may hold it"),
    "tests/vmm/kvm/test_guest_agent.py": (555, "one scripted agent, through every answer that a guest may give"),
    "tests/vmm/worker/test_capture.py": (480, "one counting guest, through every mode of capture and every kill"),
}
# Tests under tests/vhdkit and tests/vmm that have no file of their own name, each with the reason.
NO_MIRROR: dict[str, str] = {
    "tests/vhdkit/backup/test_month.py": "what the whole of backups promises, over a month",
    "tests/vhdkit/test_conformance.py": "one suite for every kind of layer",
    "tests/vhdkit/test_corrupt_reasons.py": "every way to be wrong, whichever file finds it",
    "tests/vhdkit/chain/engine/test_chain_power_cut.py": "the promise of the whole engine at a power cut",
    "tests/vhdkit/chain/engine/test_chain_power_sabotage.py": "proves that test_power_cut can fail",
}

# The specification has one word for each thing (docs/glossary.md); these are other programs' words.
BANNED_WORDS = re.compile(
    r"(?<![a-z])(deltas?|diff[ _-]files?|overlays?|overlaid|backing[ _-]files?"
    r"|chunk(s|ed|ing)?|clusters?)(?![a-z])",
    re.IGNORECASE,
)
WORDS_ROOMS = ("vhdkit/formats/", "vhdkit/chain/")
MARKERS = re.compile(r"\b(" + "|".join(("FIX" + "ME", "X" + "XX", "HA" + "CK", "TO" + "DO")) + r")\b")
MACHINE_PATHS = ("/wo" + "rk/", "/r" + "oot/")
SECTOR_NUMBERS = {512: "SECTOR_SIZE", 511: "SECTOR_MASK"}
SECTOR_SHIFT = 9
NUMBER_ROOMS = ("units.py", "layout.py")

Complaints = Iterator[str]
Rule = Callable[[str, str], Complaints]


def check_beginning(path: str, text: str) -> Complaints:
    """The first line is the licence, the second begins the docstring."""
    if not text.startswith(SPDX_LINE + "\n"):
        yield f"{path}:1: the first line is not {SPDX_LINE!r}"
    if not (ast.get_docstring(tree_of(text)) or "").strip():
        yield f"{path}:2: no docstring that says what this file decides"


def check_words(path: str, text: str) -> Complaints:
    """Formats and chains speak the specification's language."""
    if not path.startswith(WORDS_ROOMS):
        return
    for number, line in enumerate(text.splitlines(), 1):
        split_names = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", line)
        for found in BANNED_WORDS.finditer(split_names):
            if path.startswith("vhdkit/formats/vhdx/") and found[0].lower().startswith("chunk"):
                continue  # a word of [MS-VHDX]
            yield f"{path}:{number}: {found[0]!r} is not a word of the specification (docs/glossary.md)"


def check_numbers(path: str, text: str) -> Complaints:
    """The sector size is a number in units.py and in layout files, and a name everywhere else."""
    if not path.startswith("vhdkit/") or PurePosixPath(path).name in NUMBER_ROOMS:
        return
    for node in nodes_of(text):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in SECTOR_NUMBERS:
            name = SECTOR_NUMBERS[node.value]
            yield f"{path}:{node.lineno}: {node.value} is units.{name}, or a name from layout.py"
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.LShift | ast.RShift):
            shift = node.right if isinstance(node, ast.BinOp) else node.value
            if isinstance(shift, ast.Constant) and shift.value == SECTOR_SHIFT:
                yield f"{path}:{node.lineno}: a shift by {SECTOR_SHIFT} is a conversion: use units.py"


def sizes(path: str, text: str) -> Iterator[tuple[str, int, int]]:
    """(what, lines, limit) of the module and of each function in it, a function's decorators not counted."""
    yield path, len(text.splitlines()), MAX_MODULE_LINES
    for node in nodes_of(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (
                f"{path}:{node.name}",
                (node.end_lineno or node.lineno) - node.lineno + 1,
                MAX_FUNCTION_LINES,
            )


def check_sizes(path: str, text: str) -> Complaints:
    """Modules and functions stay readable."""
    for what, lines, limit in sizes(path, text):
        if lines > max(limit, OVERSIZE.get(what, (0, ""))[0]):
            yield f"{what}: {lines} lines, the limit is {limit}: split it"


def check_markers(path: str, text: str) -> Complaints:
    """What is left to do is an issue or a sentence, not a marker."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := MARKERS.search(line):
            yield f"{path}:{number}: {found[0]}: do it, or say in a sentence what is missing and why"


def check_machine_paths(path: str, text: str) -> Complaints:
    """Nothing depends on where one machine keeps its files."""
    for number, line in enumerate(text.splitlines(), 1):
        for machine_path in MACHINE_PATHS:
            if machine_path in line:
                yield f"{path}:{number}: {machine_path} is a path of one machine"


def check_type_ignores(path: str, text: str) -> Complaints:
    """A rule is switched off by its code and for one line, never as a whole."""
    if "noqa" not in text and "mypy:" not in text:
        return  # to split it into tokens takes long
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and re.match(r"#\s*(ruff:\s*noqa|mypy:|noqa\s*$)", token.string):
            yield f"{path}:{token.start[0]}: name the rule, for this line alone: {token.string}"


def check_test_docstrings(path: str, text: str) -> Complaints:
    """Every test says in a sentence which behaviour it expects."""
    if not PurePosixPath(path).name.startswith("test_"):
        return
    for node in nodes_of(text):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("test_") and not (ast.get_docstring(node) or "").strip():
            yield f"{path}:{node.lineno}: {node.name} has no docstring"


def check_mirror(path: str, text: str) -> Complaints:
    """tests/vhdkit/a/test_b.py tests vhdkit/a/b.py, or the package vhdkit/a/b; test_b_aspect.py a side of it."""
    del text
    parts = PurePosixPath(path).parts
    if len(parts) < 3 or parts[0] != "tests" or parts[1] not in ("vhdkit", "vmm") or path in NO_MIRROR:
        return
    name = parts[-1]
    if name.startswith("test_"):
        folder = ROOT.joinpath(*parts[1:-1])
        words = name.removeprefix("test_").removesuffix(".py").split("_")
        stems = [folder / "_".join(words[:count]) for count in range(1, len(words) + 1)]
        if not any(stem.with_suffix(".py").exists() or (stem / "__init__.py").exists() for stem in stems):
            yield f"{path}: there is no {stems[-1].relative_to(ROOT).as_posix()}.py that it tests"


WAITING_MODULES = ("tests/waiting.py", "vhdkit/waiting.py", "vmm/model/waiting.py")
# A constant of this name is the interval of a loop that looks.
INTERVAL = re.compile(r"(^|_)(AGAIN|EVERY|INTERVAL|LOOK|NAP|POLL|PROBE|RETRY|TRY|WATCH)_SECONDS$")


def check_sleeps(path: str, text: str) -> Complaints:
    """Code waits by a waiting module; a line that sleeps by itself says why, and so does an interval of its own."""
    if not path.startswith(("vhdkit/", "vmm/", "tests/")) or path in WAITING_MODULES:
        return
    lines = text.splitlines()
    for number in sleep_lines(text) if "sleep" in text else ():
        if "  # " not in lines[number - 1]:
            yield f"{path}:{number}: wait by {' or '.join(WAITING_MODULES)}, or say in a comment why it sleeps"
    for node in nodes_of(text) if not path.startswith("tests/") else ():
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Store) or not INTERVAL.search(node.id):
            continue
        if "  # " not in lines[node.lineno - 1]:
            yield f"{path}:{node.lineno}: LOOK_SECONDS of a waiting module, or say why this needs its own interval"


def sleep_lines(text: str) -> Iterator[int]:
    """The lines that use the `sleep` of time or asyncio, under any name; not those that only let others run."""
    modules, functions, others_run = set(), set(), set()
    for node in nodes_of(text):
        if isinstance(node, ast.Import):
            modules |= {one.asname or one.name for one in node.names if one.name in ("time", "asyncio")}
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "asyncio"):
            functions |= {one.asname or one.name for one in node.names if one.name == "sleep"}
        elif isinstance(node, ast.Call) and [ast.unparse(one) for one in node.args] == ["0"]:
            others_run.add(node.func)
    for node in nodes_of(text):
        match node:
            case ast.Name(id=name) if name in functions and node not in others_run:
                yield node.lineno
            case ast.Attribute(value=ast.Name(id=name), attr="sleep") if name in modules and node not in others_run:
                yield node.lineno


def check_back_ends(path: str, text: str) -> Complaints:
    """A switch's back end is asked, not compared: `HostSide` chooses it, `Capabilities` says what it can do."""
    if not path.startswith("vmm/"):
        return
    for node in nodes_of(text):
        if isinstance(node, ast.Compare):
            if all(isinstance(sign, ast.Is | ast.IsNot) for sign in node.ops):
                continue  # None: there is none
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject]
        else:
            continue
        names = {getattr(side, "attr", getattr(side, "id", None)) for side in sides}
        if names & {"backend", "back_end"}:
            yield f"{path}:{node.lineno}: ask the back end (vmm/net/backends.py) or its capabilities instead"


# Names of classes that stand twice in the two packages, because both mean the same; any other name is unique.
SAME_MEANING: dict[str, str] = {
    "AccessDenied": "each package has errors of its own, under the same names for the same failures",
    "AlreadyExists": "as AccessDenied",
    "NoSpace": "as AccessDenied",
    "NotFound": "as AccessDenied",
    "Bat": "the block allocation table, of VHD and of VHDX",
    "BatInFile": "as Bat",
    "Commit": "what an open image must still write, of VHD and of VHDX",
    "LocatorEntry": "an entry of the parent locators, of VHD and of VHDX",
    "Metadata": "what an image file says about itself, of VHD and of VHDX",
    "Packing": "what moves where in a file, of VHD and of VHDX",
    "Consent": "what the user allows, of a repair and of an import",
    "ControlClient": "the client of a control socket, of the NBD server and of a worker",
    "ControlServer": "the server of a control socket, of a switch and of a worker",
    "Loop": "an event loop, of the NBD server and of a switch",
    "Machine": "a machine: as it is defined, and what single rooms of the worker need of a running one",
    "Option": "an option of the protocol, of NBD and of DHCP",
    "Request": "a request of the protocol, of NBD and of JSON-RPC",
    "VerbGroup": "the commands of a program, each imported when it is used",
    "_Client": "a connection to a control socket, as its server sees it",
    "_Group": "the main command of a program",
    "_Search": "one search along the names of a chain, upwards and downwards",
    "_Settings": "the base of settings that are checked when they are made",
}


def classes(tree: ast.Module) -> set[str]:
    """The classes that a module defines."""
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def repeated(found: Iterable[set[str]]) -> set[str]:
    """The names of classes that more than one module defines."""
    counts = Counter(name for names in found for name in names)
    return {name for name, count in counts.items() if count > 1}


PYTHON_RULES: tuple[Rule, ...] = (
    check_beginning,
    check_words,
    check_numbers,
    check_sizes,
    check_type_ignores,
    check_test_docstrings,
    check_mirror,
    check_sleeps,
    check_back_ends,
)
TEXT_RULES: tuple[Rule, ...] = (check_markers, check_machine_paths)
BAD: tuple[tuple[Rule, str, str], ...] = (
    (check_beginning, "vhdkit/a.py", '"""Says what it decides."""\n'),
    (check_beginning, "vhdkit/a.py", f"{SPDX_LINE}\nx = 1\n"),
    (check_words, "vhdkit/chain/a.py", "# the backing file of the leaf"),
    (check_words, "vhdkit/chain/a.py", "chunk_size = 1"),
    (check_words, "vhdkit/formats/a.py", "class BlockCluster: ..."),
    (check_words, "vhdkit/formats/a.py", "# Overlays"),
    (check_numbers, "vhdkit/a.py", "x = size // 512"),
    (check_numbers, "vhdkit/a.py", "x = 0x200"),
    (check_numbers, "vhdkit/a.py", "x = offset & 511"),
    (check_numbers, "vhdkit/a.py", "x = sector << 9"),
    (check_numbers, "vhdkit/a.py", "x >>= 9"),
    (check_sizes, "vhdkit/a.py", "x = 1\n" * (MAX_MODULE_LINES + 1)),
    (check_sizes, "vhdkit/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (check_markers, "docs/a.md", "TO" + "DO: write this"),
    (check_markers, "vhdkit/a.py", "# FIX" + "ME"),
    (check_machine_paths, "script/a", "cd /wo" + "rk/main"),
    (check_type_ignores, "vhdkit/a.py", "# ruff: no" + "qa: E501\n"),
    (check_type_ignores, "vhdkit/a.py", "x = 1  # no" + "qa\n"),
    (check_test_docstrings, "tests/test_a.py", "class TestIt:\n    def test_x(self): ..."),
    (check_mirror, "tests/vhdkit/test_no_such_module.py", ""),
    (check_sleeps, "tests/test_a.py", "import time\ntime.sleep(0.5)"),
    (check_sleeps, "tests/test_a.py", "import asyncio\nasync def f():\n    await asyncio.sleep(1)"),
    (check_sleeps, "vhdkit/a.py", "from time import sleep\nsleep(0.5)"),
    (check_sleeps, "vmm/a.py", "import time as clock\nclock.sleep(LOOK_SECONDS)"),
    (check_sleeps, "vmm/a.py", "from asyncio import sleep as pause\nasync def f():\n    await pause(1)"),
    (check_sleeps, "vmm/a.py", "import time\ndef f(sleep=time.sleep): ..."),
    (check_sleeps, "vmm/a.py", "_LOOK_SECONDS = 0.05"),
    (check_sleeps, "vhdkit/a.py", "_TRIES, _TRY_SECONDS = 250, 0.02"),
    (check_sleeps, "vhdkit/a.py", "class A:\n    AGAIN_SECONDS: Final = 1.0"),
    (check_back_ends, "vmm/net/a.py", 'x = 1 if host.spec.backend == "user" else 2'),
    (check_back_ends, "vmm/net/a.py", 'x = "user" != back_end'),
    (check_back_ends, "vmm/net/a.py", 'x = spec.backend in ("user", "bridge")'),
    (check_back_ends, "vmm/net/a.py", "match backend:\n    case _: ..."),
)
GOOD: tuple[tuple[str, str], ...] = (
    ("vhdkit/chain/a.py", f'{SPDX_LINE}\n"""Parents."""\nfrom datetime import timedelta\n'),
    ("vhdkit/units.py", f'{SPDX_LINE}\n"""Units."""\nx = 512\n'),
    ("vhdkit/a.py", f'{SPDX_LINE}\n"""Other numbers."""\nx = (9, 1 << 10, True, "512")  # noqa: E501\n'),
    ("vmm/net/a.py", f'{SPDX_LINE}\n"""Asks."""\nx = host.backend.is_up() and plugged.back_end is not None\n'),
    ("tests/a.py", f'{SPDX_LINE}\n"""Sleeps."""\nimport time\ntime.sleep(1)  # nothing may happen meanwhile\n'),
    ("vmm/a.py", f'{SPDX_LINE}\n"""Lets others run."""\nimport asyncio\nawait asyncio.sleep(0)\n'),
    ("vmm/a.py", f'{SPDX_LINE}\n"""Its own."""\n_LOOK_SECONDS = 1.0  # each look starts a program\n'),
    ("tests/vmm/cli/test_main.py", f'{SPDX_LINE}\n"""Mirrors."""\ndef test_x():\n    """Works."""\n'),
)


@cache
def oversize_and_complaints() -> tuple[dict[str, int], dict[Rule, list[str]]]:
    """What is longer than its limit, and what each rule says, of all Python files: each file is parsed once."""
    oversize: dict[str, int] = {}
    said: dict[Rule, list[str]] = {rule: [] for rule in PYTHON_RULES}
    for path, text in python_files(*CODE_FOLDERS):
        for rule in PYTHON_RULES:
            said[rule] += rule(path, text)
        oversize |= {what: lines for what, lines, limit in sizes(path, text) if lines > limit}
    return oversize, said


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_files(rule: Rule) -> None:
    """Every Python file of the project obeys the rule."""
    complaints = oversize_and_complaints()[1][rule]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_text_files(rule: Rule) -> None:
    """Every file that people wrote obeys the rule: code, scripts, documents, configuration."""
    complaints = [one for path, text in project_text_files() for one in rule(path, text)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    """Self-test: the rule complains about a text that breaks it."""
    assert list(rule(path, text))


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_rules_let_good_code_pass(path: str, text: str) -> None:
    """Self-test: no rule complains about what is allowed."""
    assert [one for rule in (*PYTHON_RULES, *TEXT_RULES) for one in rule(path, text)] == []


def test_a_class_name_has_one_meaning() -> None:
    """A name stands for one class of vhdkit and vmm together; the exceptions are listed, and are still needed."""
    found = repeated(classes(tree_of(text)) for _, text in python_files("vhdkit", "vmm"))
    assert found == set(SAME_MEANING), "rename by the field's terms, or say why both mean the same"


def test_repeated_class_names_are_found() -> None:
    """Self-test: a name in two modules is found, functions and names in one module are none."""
    modules = ("class A: ...\nclass B: ...", "class B: ...\ndef a(): ...", "class A1: ...\ndef A(): ...")
    assert repeated(classes(ast.parse(text)) for text in modules) == {"B"}


def test_exceptions_only_shrink() -> None:
    """Every exception is still needed, and not larger than what it excuses."""
    found, _ = oversize_and_complaints()
    for what, (bound, reason) in OVERSIZE.items():
        assert reason and bound - SLACK_LINES < found.get(what, 0) <= bound, f"{what} has {found.get(what)} lines"
    assert not [what for what in OVERSIZE if not what.startswith("tests/")], "the packages keep the limit"
    gone = [path for path in NO_MIRROR if not (ROOT / path).exists()]
    assert not gone, f"drop from NO_MIRROR: {gone}"
