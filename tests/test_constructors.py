# SPDX-License-Identifier: Apache-2.0
"""Constructors of vhdkit only combine values: none takes a lock, opens a file, or reads or writes one.

Whatever takes a lock or reads something is a function, or a context that releases it. So a value can be made in a test
without a file, and what an operation holds is visible where it begins. A constructor may ask for the length of a file.

The source is parsed, never imported. A constructor is followed into the methods and functions of its own module; calls
into other modules count by their names. For every way to break the rule, one bad line proves that the check can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.sources import nodes_of, tree_of
from tests.support import python_files
from tests.test_layering import OS_EVERYWHERE

CONSTRUCTORS = {"__init__", "__new__", "__post_init__"}
# Calls with these names, on any object or module.
LOCKING = {
    "become_reader",
    "become_writer",
    "folder_held",
    "folders_held",
    "hold",
    "inherit_lock",
    "lock",
    "open_held",
}
OPENING = {
    "open",
    "open_dynamic",
    "open_layer",
    "open_layers",
    "open_regular",
    "open_settled",
    "opened",
    "opened_again",
    "reopened",
}
READING = {
    "allocated_bytes",
    "data_runs",
    "exists",
    "facts",
    "file_id",
    "has_notes",
    "identify",
    "is_regular",
    "label",
    "look",
    "modified_ns",
    "pread",
    "pread_into",
    "probed",
    "read",
    "read_into",
    "read_metadata",
    "read_partitions",
    "read_whole",
    "real_path",
    "regular_files",
    "try_pread_into",
}
CHANGING = {
    "commit",
    "copy_from",
    "disown",
    "flush",
    "punch",
    "pwrite",
    "remove_file",
    "reserve",
    "seal",
    "set_label",
    "settle",
    "sync",
    "truncate",
    "write",
    "write_whole",
}
FORBIDDEN = LOCKING | OPENING | READING | CHANGING
OS_ALLOWED = OS_EVERYWHERE | {"getegid", "geteuid", "getgid", "getpid", "getuid"}
# Classes that represent a resource of the system, from the constructor on; `close` or `with` releases it.
RESOURCES = {
    "vhdkit/folder.py": {"NewFile"},
    "vhdkit/shared_words.py": {"SharedWords"},
    "vhdkit/sockets.py": {"PrivateFolder", "SocketFile"},
}


def complaints(path: str, source: str) -> Iterator[str]:
    """The calls in constructors that do more than combine values."""
    tree = tree_of(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in nodes_of(source):
        if isinstance(node, ast.ClassDef) and node.name not in RESOURCES.get(path, set()):
            methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
            for line, call in _calls([methods[one] for one in CONSTRUCTORS & methods.keys()], methods, functions):
                yield f"{path}:{line}: the constructor of {node.name} calls {call}; a function or a context does that"


def _calls(
    todo: list[ast.FunctionDef], methods: dict[str, ast.FunctionDef], functions: dict[str, ast.FunctionDef]
) -> Iterator[tuple[int, str]]:
    """(line, call) of forbidden calls in these functions, and in those of this module that they call."""
    seen: set[str] = set()
    while todo:
        for node in ast.walk(todo.pop()):
            if not isinstance(node, ast.Call):
                continue
            called, inner = node.func, None
            if isinstance(called, ast.Attribute):
                name = called.attr
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                inner = methods.get(name) if owner == "self" else None
                is_bad = name in FORBIDDEN or (owner == "os" and name not in OS_ALLOWED)
            elif isinstance(called, ast.Name):
                name, inner = called.id, functions.get(called.id)
                is_bad = name in FORBIDDEN
            else:
                continue
            if inner is None and is_bad:
                yield node.lineno, ast.unparse(called)
            elif inner is not None and f"{inner.name} {inner.lineno}" not in seen:
                seen.add(f"{inner.name} {inner.lineno}")
                todo.append(inner)


def test_constructors_only_combine_values() -> None:
    """No constructor in vhdkit takes a lock, opens, reads or writes."""
    found = [one for path, source in python_files("vhdkit") for one in complaints(path, source)]
    assert not found, "\n" + "\n".join(found)


def test_every_listed_resource_needs_its_exception() -> None:
    """The list of exceptions names no class that follows the rule."""
    sources = dict(python_files("vhdkit"))
    for path, names in RESOURCES.items():
        without = list(complaints("elsewhere.py", sources[path]))
        assert all(any(f"constructor of {name} calls" in one for one in without) for name in names), path


@pytest.mark.parametrize(
    "body",
    [
        "self.store.lock(writer=True)",
        "file_of_layer(layer).become_writer()",
        "self.store = FileStore.open(path)",
        "self.raw = store.pread(0, 512)",
        "self.path = real_path(path)",
        "self.runs = list(layer.store.data_runs(0, 512))",
        "store.set_label('notes', None)",
        "os.unlink(path)",
        "self._take()",
        "take(store)",
    ],
)
@pytest.mark.parametrize("name", sorted(CONSTRUCTORS))
def test_the_rule_can_fail(name: str, body: str) -> None:
    """Self-test: each violation is reported, also through a method or a function."""
    source = f"class A:\n    def {name}(self, store, path):\n        {body}\n"
    source += "    def _take(self):\n        self.store.lock(writer=True)\n\n\ndef take(store):\n    store.lock()\n"
    assert list(complaints("vhdkit/chain/verbs/merge.py", source))


@pytest.mark.parametrize(
    "body",
    [
        "self.size_bytes = store.size()",
        "self.path = os.fsdecode(path)",
        "self._lock = threading.Lock()",
        "self.units = np.flatnonzero(target.allocated_blocks())",
        "self._again(0)",
    ],
)
def test_the_rule_lets_good_code_pass(body: str) -> None:
    """Self-test: values, and functions that call themselves, are fine."""
    source = f"class A:\n    def __init__(self, store, path):\n        {body}\n"
    source += "    def _again(self, number):\n        self._again(number + 1)\n"
    assert not list(complaints("vhdkit/chain/verbs/merge.py", source))
