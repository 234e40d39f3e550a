# SPDX-License-Identifier: Apache-2.0
"""State shared by all threads of a process is not changed, and contexts are entered by `with`.

The source is parsed, never imported. For every way to break a rule, one bad line proves that the check can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.sources import nodes_of, tree_of
from tests.support import python_files
from tests.test_layering import uses

SHARED = {"chdir", "fchdir", "umask"}
OWN_PROCESSES = ("vhdkit/cli/background.py", "vmm/net/enclosed.py")  # these run as separate processes
CONTEXT_METHODS = {"__aenter__", "__aexit__", "__enter__", "__exit__"}


def complaints(path: str, source: str) -> Iterator[str]:
    """Only a process's `main` sets process-wide state; only `with` and ExitStack enter and leave contexts."""
    tree = tree_of(source)
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    for line, module, name in uses(source):
        inside = any(node.lineno <= line <= (node.end_lineno or node.lineno) for node in mains)
        if module == "os" and name in SHARED and not inside and path not in OWN_PROCESSES:
            yield f"{path}:{line}: os.{name} changes what other threads do at this moment; only a process's main may"
    for node in nodes_of(source):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_super = isinstance(node.func.value, ast.Call) and ast.unparse(node.func.value.func) == "super"
        if node.func.attr in CONTEXT_METHODS and not is_super:
            yield f"{path}:{node.lineno}: {node.func.attr} is for `with` and ExitStack to call"


def test_the_packages_leave_shared_state_alone() -> None:
    """Neither package changes the umask or the working folder while other threads may run."""
    found = [one for path, source in python_files("vhdkit", "vmm") for one in complaints(path, source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vmm/kvm/console.py", "import os\ndef listen():\n    before = os.umask(0o177)"),
        ("vhdkit/folder.py", "from os import chdir"),
        ("vmm/worker/worker.py", "import os\nclass Worker:\n    def main(self):\n        os.umask(0)"),
        ("vmm/snapshots/steps.py", "lock.__enter__()"),
        ("vhdkit/serve/control/operations.py", "super(prepared).x.__exit__()"),
    ],
)
def test_the_rule_can_fail(path: str, source: str) -> None:
    """Self-test: it complains about a line that breaks it."""
    assert list(complaints(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vmm/worker/worker.py", "import os\ndef main():\n    os.umask(0o077)"),
        ("vmm/net/enclosed.py", "import os\ndef enter():\n    os.chdir('/')"),
        ("vhdkit/disk.py", "class A:\n    def __exit__(self, *why):\n        super().__exit__(*why)"),
    ],
)
def test_the_rule_lets_good_code_pass(path: str, source: str) -> None:
    """Self-test: it does not complain about what is allowed."""
    assert not list(complaints(path, source))
