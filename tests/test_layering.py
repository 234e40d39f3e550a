# SPDX-License-Identifier: Apache-2.0
"""Which module may import which, which file may use which foreign library, and which may touch files, print or exit.

The layers are the table below. Every rule is a function from (path, source) to complaints, which is run over the whole
project and, to prove that it can fail, over one bad line each. The source is parsed, never imported.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.sources import nodes_of
from tests.support import ROOT, python_files

FILES_AND_IMAGES = """
    likeness wording locks descriptor write_behind space transfer page_cache arrival uncached named streams sending
    store unnamed maker unfinished hard_links folder folder_lock held_folder shared_words sockets volume beneath
    local_volume guarded trusted attributes xattrs image
"""
# Lowest first. A module may import from its own row and the rows above it in this table.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "vhdkit.units",
        "vhdkit.errors",
        "vhdkit.arguments",
        "vhdkit.buffers",
        "vhdkit.parts",
        "vhdkit.readahead",
        "vhdkit.finding",
        "vhdkit.jsonrpc",
        "vhdkit.jsontext",
        "vhdkit.waiting",
        *("vhdkit.rate", "vhdkit.at_once"),
    ),
    tuple(f"vhdkit.{name}" for name in FILES_AND_IMAGES.split()),
    ("vhdkit.formats",),
    ("vhdkit.chain.records",),
    ("vhdkit.chain.names",),
    ("vhdkit.chain.engine",),
    ("vhdkit.chain", "vhdkit.chain.verbs"),
    ("vhdkit.disk",),
    ("vhdkit.backup", "vhdkit.backups"),
    ("vhdkit.serve.nbd", "vhdkit.serve.notify"),
    ("vhdkit.serve.opening",),
    ("vhdkit.serve", "vhdkit.serve.control", "vhdkit.serve.mount", "vhdkit.serve.nbdkit"),
    ("vhdkit", "vhdkit.__main__", "vhdkit.cli"),
)
VMM_LAYERS: tuple[tuple[str, ...], ...] = (
    ("vmm.model",),
    ("vmm.host",),
    ("vmm.kvm", "vmm.net", "vmm.schedule", "vmm.hyperv"),
    ("vmm.store",),
    ("vmm.snapshots",),
    ("vmm.processes",),
    ("vmm.worker", "vmm.api"),
    ("vmm", "vmm.__main__", "vmm.keeper", "vmm.cli"),
)
# These see only the listed parts of vhdkit, and none of these modules of Python.
SANS_IO: dict[str, set[str]] = {
    "vhdkit.jsonrpc": set(),
    "vhdkit.readahead": {"vhdkit.units"},
    "vhdkit.serve.nbd.wire": {"vhdkit.units", "vhdkit.errors"},
    "vhdkit.serve.nbd.options": {"vhdkit.units", "vhdkit.errors", "vhdkit.serve", "vhdkit.serve.nbd.wire"},
    "vhdkit.serve.nbd.protocol": {
        "vhdkit.units",
        "vhdkit.errors",
        "vhdkit.serve",
        "vhdkit.serve.nbd.options",
        "vhdkit.serve.nbd.wire",
    },
}
NOT_SANS_IO = {"asyncio", "os", "select", "selectors", "socket", "ssl", "threading"}
# Packages that must not see each other.
STRANGERS = (("vmm.kvm", "vmm.net"), ("vmm.hyperv", "vmm.kvm"), ("vmm.hyperv", "vmm.net"), ("vmm.worker", "vmm.api"))
# A foreign library and the only files that may import it ("*" also matches "/").
FOREIGN_HOMES = {
    "PIL": ("vhdkit/cli/*",),
    "click": ("vhdkit/cli/*", "vmm/cli/*"),
    "google_crc32c": ("vhdkit/formats/vhdx/crc.py",),
    "mfusepy": ("vhdkit/serve/mount/fuse.py",),
    "nbdkit": ("vhdkit/serve/nbdkit/plugin.py",),
    "pyroute2": ("vmm/net/bridge.py", "vmm/net/shaping.py"),
    "qemu": ("vmm/kvm/qmp.py",),
    "rich": ("vhdkit/cli/*", "vmm/cli/*"),
}
# The only file I/O in vhdkit: bytes and names. Elsewhere `os` provides only what is listed here.
FILE_ROOMS = (
    "vhdkit/store.py",
    "vhdkit/named.py",
    "vhdkit/space.py",
    "vhdkit/page_cache.py",
    "vhdkit/sending.py",
    "vhdkit/folder.py",
    "vhdkit/hard_links.py",
    "vhdkit/folder_lock.py",
    "vhdkit/held_folder.py",
    "vhdkit/shared_words.py",
    "vhdkit/sockets.py",
    "vhdkit/maker.py",
    "vhdkit/unfinished.py",
    "vhdkit/likeness.py",
    "vhdkit/beneath.py",
    "vhdkit/xattrs.py",
    "vhdkit/guarded.py",
    "vhdkit/transfer.py",
    *("vhdkit/uncached.py", "vhdkit/streams.py"),
    "vhdkit/arrival.py",
    "vhdkit/write_behind.py",
    "vhdkit/locks.py",
    "vhdkit/descriptor.py",
    "vhdkit/attributes.py",
)
# In addition, files of the kernel, not bytes of a disk: its tables of mounts, its switches.
KERNEL_ROOMS = ("vhdkit/serve/mount/host.py",)
FILE_MODULES = {"ctypes", "fcntl", "fileinput", "glob", "mmap", "shutil", "tempfile"}
MODULES_OF_ROOM = {  # libfuse's buffers and the heap, not files
    "vhdkit/serve/mount/fuse.py": {"ctypes"},
    "vhdkit/serve/nbd/heap.py": {"ctypes"},
}
FILE_METHODS = {"fromfile", "memmap", "tofile"}  # numpy's own ways to access files
OS_EVERYWHERE = {
    "PathLike",
    "cpu_count",
    "curdir",
    "fsdecode",
    "fsencode",
    "fspath",
    "pardir",
    "path",
    "sep",
    "strerror",
}
OS_PATH_EVERYWHERE = {
    "abspath",
    "basename",
    "commonpath",
    "dirname",
    "isabs",
    "join",
    "normpath",
    "relpath",
    "split",
    "splitext",
}
OS_OF_ROOM = {
    "vhdkit/trusted.py": {"environ", "pathsep"},
    "vhdkit/backup/": {"fstat", "getpid", "urandom"},
    "vhdkit/cli/": {"devnull", "environ", "get_terminal_size", "getpid", "isatty", "kill"},
    "vhdkit/cli/background.py": {
        "O_CLOEXEC",
        "O_RDWR",
        "_exit",
        "chdir",
        "close",
        "dup",
        "dup2",
        "fork",
        "open",
        "pipe",
        "read",
        "setsid",
        "waitpid",
        "write",
    },
    "vhdkit/cli/serve_nbdkit.py": {
        *("POSIX_SPAWN_DUP2", "WNOHANG", "close", "defpath", "dup", "pathsep", "posix_spawn", "waitpid"),
        "waitstatus_to_exitcode",
    },
    "vhdkit/serve/mount/fuse.py": {"O_DSYNC", "O_RDWR", "O_WRONLY"},
    "vhdkit/serve/nbdkit/command.py": {"defpath", "pathsep"},
    "vhdkit/serve/": {"environ", "getegid", "geteuid", "getgid", "getpid", "getuid", "kill", "pidfd_open"},
}
# The properties that name a file with a definition, and the only files that write it.
DEFINITION_WRITERS = {
    # of a machine, of a snapshot, of a backup's copy
    "definition": ("vmm/store/registry.py", "vmm/store/snapshots/memory.py"),
    "running": ("vmm/worker/running.py", "vmm/processes/worker_connection.py"),  # while it runs, at its start
}
WRITING_CALLS = {"write_whole", "rename", "replace", "link"}
# The library never prints, exits or configures logging. Only these do.
TALKING_ROOMS = ("vhdkit/cli/*", "vhdkit/__main__.py", "vmm/cli/*", "vmm/__main__.py")
TALKING_CALLS = {"breakpoint", "exit", "input", "print", "quit"}
TALKING_ATTRIBUTES = {
    "logging": {"basicConfig", "disable", "setLoggerClass"},
    "os": {"_exit", "abort"},
    "sys": {"exit", "stderr", "stdin", "stdout"},
}
TALKING_METHODS = {"addHandler", "setLevel"}


def module_of(path: str) -> str:
    """The dotted name of one of our files."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def modules() -> frozenset[str]:
    """Every module of vhdkit and vmm."""
    return frozenset(module_of(path) for path, _ in python_files("vhdkit", "vmm"))


def imports_of(path: str, source: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import, inside functions too; the name is empty for `import module`.

    `from package import module` is reported as that module with an empty name, a relative import as absolute.
    """
    package = module_of(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if inner in modules() or rank_of(inner) not in (None, rank_of(module)):
                    yield node.lineno, inner, ""
                else:
                    yield node.lineno, module, alias.name


def is_in(module: str, room: str) -> bool:
    """True if `module` is `room` or inside it."""
    return module == room or module.startswith(room + ".")


def rank_of(module: str) -> int | None:
    """The row of its package's table that a module is in; None if it is in no table."""
    for rank, rooms in enumerate(VMM_LAYERS if is_in(module, "vmm") else LAYERS):
        for room in rooms:
            if module == room or (room not in ("vhdkit", "vmm") and is_in(module, room)):
                return rank
    return None


@cache
def public_names() -> frozenset[str]:
    """What vhdkit's `__all__` lists."""
    path = ROOT / "vhdkit" / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            value = getattr(node, "value", None)
            return frozenset(ast.literal_eval(value)) if value is not None else frozenset()
    return frozenset()


def check_layers(path: str, source: str) -> Iterator[str]:
    """Each package follows its table, and vhdkit never sees vmm."""
    here = module_of(path)
    package = here.split(".")[0]
    if package not in ("vhdkit", "vmm"):
        return
    rank = rank_of(here)
    if rank is None:
        yield f"{path}: {here} has no row in the tables of layers"
        return
    for line, module, _ in imports_of(path, source):
        if package == "vhdkit" and is_in(module, "vmm"):
            yield f"{path}:{line}: vhdkit never imports vmm"
        elif is_in(module, package):
            other = rank_of(module)
            if other is None:
                yield f"{path}:{line}: {module} has no row in the tables of layers"
            elif other > rank:
                yield f"{path}:{line}: {here} is below {module} and may not import it"


def check_sans_io(path: str, source: str) -> Iterator[str]:
    """The protocols use no sockets, threads or disks."""
    allowed = SANS_IO.get(module_of(path))
    if allowed is None:
        return
    for line, module, _ in imports_of(path, source):
        if is_in(module, "vhdkit") and module not in allowed:
            yield f"{path}:{line}: may see only {', '.join(sorted(allowed))}, not {module}"
        elif module.split(".")[0] in NOT_SANS_IO:
            yield f"{path}:{line}: is pure and may not import {module}"


def check_public_door(path: str, source: str) -> Iterator[str]:
    """vmm sees vhdkit only through its public names, and packages that must not see each other do not."""
    here = module_of(path)
    if not is_in(here, "vmm"):
        return
    for line, module, name in imports_of(path, source):
        first, *rest = f"{module}.{name}".rstrip(".").split(".")
        if first == "vhdkit" and rest and (len(rest) > 1 or rest[0] not in public_names()):
            yield f"{path}:{line}: {'.'.join(['vhdkit', *rest])} is not a public name of vhdkit"
        for pair in STRANGERS:
            for one, other in (pair, pair[::-1]):
                if is_in(here, one) and is_in(f"{module}.{name}", other):
                    yield f"{path}:{line}: {one} and {other} do not see each other"
    for node in nodes_of(source):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "vhdkit" and node.attr not in public_names():
            yield f"{path}:{node.lineno}: vhdkit.{node.attr} is not a public name of vhdkit"


def check_foreign(path: str, source: str) -> Iterator[str]:
    """Each foreign library is imported only in its home."""
    for line, module, _ in imports_of(path, source):
        homes = FOREIGN_HOMES.get(module.split(".")[0])
        if homes is not None and not any(fnmatch.fnmatch(path, home) for home in homes):
            yield f"{path}:{line}: {module} may be imported only in {', '.join(homes)}"


def names_of_modules(source: str) -> dict[str, str]:
    """What each name bound by `import` stands for: {"np": "numpy", "os": "os"}."""
    bound = {}
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
    return bound


def uses(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of `module.name` and `from module import name`; `os.path.join` counts as "os.path"."""
    bound = names_of_modules(source)
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name
        elif isinstance(node, ast.Attribute):
            value = node.value
            inner = [value.attr] if isinstance(value, ast.Attribute) else []
            name = value.value if isinstance(value, ast.Attribute) else value
            if isinstance(name, ast.Name) and name.id in bound:
                yield node.lineno, ".".join([bound[name.id], *inner]), node.attr


def builtin_calls(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of calls of a bare name that this module neither defines nor imports."""
    own = set()
    for node in nodes_of(source):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            own |= {alias.asname or alias.name for alias in node.names}
    for node in nodes_of(source):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in own:
            yield node.lineno, node.func.id


def check_files(path: str, source: str) -> Iterator[str]:
    """In vhdkit only the file rooms touch files."""
    if not path.startswith("vhdkit/") or path in (*FILE_ROOMS, *KERNEL_ROOMS):
        return
    rooms = " and ".join(FILE_ROOMS)
    allowed = OS_EVERYWHERE.union(*(names for room, names in OS_OF_ROOM.items() if path.startswith(room)))
    for line, module, _ in imports_of(path, source):
        if module.split(".")[0] in FILE_MODULES - MODULES_OF_ROOM.get(path, set()):
            yield f"{path}:{line}: only {rooms} touch files; {module} belongs there"
    for line, name in builtin_calls(source):
        if name == "open":
            yield f"{path}:{line}: only {rooms} open files"
    for line, module, name in uses(source):
        wrong = (
            (module == "os" and name not in allowed)
            or (module in ("os.path", "posixpath") and name not in OS_PATH_EVERYWHERE)
            or (module == "io" and name in ("FileIO", "open", "open_code"))
            or (module == "pathlib" and not name.startswith("Pure"))
        )
        if wrong:
            yield f"{path}:{line}: only {rooms} touch files; {module}.{name} belongs there"
    for node in nodes_of(source):
        if isinstance(node, ast.Attribute) and node.attr in FILE_METHODS:
            yield f"{path}:{node.lineno}: only {rooms} touch files; .{node.attr} goes round them"


def check_silent(path: str, source: str) -> Iterator[str]:
    """Outside the command line nothing prints, exits or configures logging."""
    if not path.startswith(("vhdkit/", "vmm/")) or any(fnmatch.fnmatch(path, room) for room in TALKING_ROOMS):
        return
    for line, name in builtin_calls(source):
        if name in TALKING_CALLS:
            yield f"{path}:{line}: a library does not {name}(); only {', '.join(TALKING_ROOMS)} may"
    for line, module, name in uses(source):
        if name in TALKING_ATTRIBUTES.get(module, ()):
            yield f"{path}:{line}: a library does not use {module}.{name}"
    for node in nodes_of(source):
        if isinstance(node, ast.Attribute) and node.attr in TALKING_METHODS:
            yield f"{path}:{node.lineno}: a library does not configure logging (.{node.attr})"
        elif isinstance(node, ast.Name) and node.id == "SystemExit":
            yield f"{path}:{node.lineno}: a library does not exit (SystemExit)"


def check_harness(path: str, source: str) -> Iterator[str]:
    """The test harness could be a part of vhdkit (`vhdkit.testing`): it uses vhdkit, not its command line or private
    names, and neither vmm nor the tests."""
    if not path.startswith("tests/harness/"):
        return
    for line, module, name in imports_of(path, source):
        first = module.split(".")[0]
        known = first in sys.stdlib_module_names or first in ("numpy", "vhdkit") or is_in(module, "tests.harness")
        if not known and not (first == "hypothesis" and path == "tests/harness/chains.py"):
            yield f"{path}:{line}: the harness may not import {module}"
        elif is_in(module, "vhdkit.cli") or (first == "vhdkit" and (name or "").startswith("_")):
            yield f"{path}:{line}: the harness may not import {module}: {name} is not for other rooms"


def check_one_door(path: str, source: str) -> Iterator[str]:
    """Only one place checks whether a machine runs: `vmm.api.machines` opens it, and the rest uses the port."""
    if not path.startswith("vmm/") or path.startswith("vmm/processes/") or path == "vmm/api/machines.py":
        return
    for line, module, name in imports_of(path, source):
        if module == "vmm.processes.worker_connection" and name in ("contact", "changing"):
            yield f"{path}:{line}: only vmm/api/machines.py opens machines"
    for node in nodes_of(source):
        if not isinstance(node, ast.Attribute) or node.attr not in ("contact", "changing"):
            continue
        if ast.unparse(node.value) in ("contact", "worker_connection"):
            yield f"{path}:{node.lineno}: only vmm/api/machines.py opens machines"


def check_definitions(path: str, source: str) -> Iterator[str]:
    """A machine's definition, stored or running, is written in one place each, and its path named in one."""
    if not path.startswith("vmm/"):
        return
    for node in nodes_of(source):
        if isinstance(node, ast.Constant) and node.value == "machine.json" and path != "vmm/model/paths.py":
            yield f"{path}:{node.lineno}: only vmm/model/paths.py names the file of a definition"
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in ("spec", "_spec"):
            if ast.unparse(node.value).endswith("running"):
                yield f"{path}:{node.lineno}: the definition of a running machine is changed by `Running.redefine`"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in WRITING_CALLS:
            named = {one.attr for given in node.args for one in ast.walk(given) if isinstance(one, ast.Attribute)}
            for name in named & set(DEFINITION_WRITERS):
                if path not in DEFINITION_WRITERS[name]:
                    yield f"{path}:{node.lineno}: .{name} is written only in {', '.join(DEFINITION_WRITERS[name])}"


Rule = Callable[[str, str], Iterator[str]]
RULES: tuple[Rule, ...] = (
    check_layers,
    check_sans_io,
    check_public_door,
    check_foreign,
    check_files,
    check_silent,
    check_harness,
    check_definitions,
    check_one_door,
)
# One bad line for every way a rule can be broken.
BAD: tuple[tuple[Rule, str, str], ...] = (
    (check_one_door, "vmm/api/manager.py", "from vmm.processes.worker_connection import contact"),
    (check_one_door, "vmm/cli/life.py", "worker_connection.contact(place)"),
    (check_one_door, "vmm/api/manager.py", "with contact.changing(name) as (machine, client): ..."),
    (check_definitions, "vmm/worker/saving.py", "write_whole(machine.definition, b'')"),
    (check_definitions, "vmm/worker/saving.py", "paths.write_whole(self.runtime.running, b'', durable=False)"),
    (check_definitions, "vmm/worker/saving.py", "os.rename(part, machine.paths.definition)"),
    (check_definitions, "vmm/worker/saving.py", "running.spec = spec"),
    (check_definitions, "vmm/api/manager.py", "name = 'machine.json'"),
    (check_layers, "vhdkit/store.py", "import vhdkit.formats.raw"),
    (check_layers, "vhdkit/formats/raw.py", "from vhdkit.chain.engine import chain"),
    (check_layers, "vhdkit/formats/raw.py", "from vhdkit import disk"),
    (check_layers, "vhdkit/formats/vhd/bat.py", "from ...serve.control import Control"),
    (check_layers, "vhdkit/chain/verbs/merge.py", "def later():\n    from vhdkit.disk import Disk"),
    (check_layers, "vhdkit/disk.py", "from vhdkit import Disk"),
    (check_layers, "vhdkit/cli/main.py", "import vmm"),
    (check_layers, "vhdkit/stray.py", ""),
    (check_layers, "vmm/stray.py", ""),
    (check_layers, "vmm/model/spec.py", "from vmm.store import registry"),
    (check_layers, "vmm/processes/rpc.py", "def later():\n    from vmm.api.manager import Manager"),
    (check_sans_io, "vhdkit/jsonrpc.py", "import asyncio"),
    (check_sans_io, "vhdkit/jsonrpc.py", "from vhdkit import errors"),
    (check_sans_io, "vhdkit/serve/nbd/wire.py", "import socket"),
    (check_sans_io, "vhdkit/serve/nbd/protocol.py", "from asyncio import Queue"),
    (check_sans_io, "vhdkit/serve/nbd/protocol.py", "from vhdkit.disk import Disk"),
    (check_sans_io, "vhdkit/serve/nbd/wire.py", "from vhdkit.serve.nbd import protocol"),
    (check_public_door, "vmm/api/manager.py", "from vhdkit.store import FileStore"),
    (check_public_door, "vmm/api/manager.py", "from vhdkit import _private"),
    (check_public_door, "vmm/processes/rpc.py", "from vhdkit.jsonrpc import LineBuffer"),
    (check_public_door, "vmm/api/manager.py", "import vhdkit\nvhdkit._private"),
    (check_public_door, "vmm/kvm/cmdline.py", "from vmm.net.plan import Plan"),
    (check_public_door, "vmm/net/plan.py", "from vmm import kvm"),
    (check_public_door, "vmm/worker/running.py", "from vmm.api import adapters"),
    (check_foreign, "vhdkit/formats/vhd/bat.py", "import google_crc32c"),
    (check_foreign, "vhdkit/chain/engine/chain.py", "import click.testing"),
    (check_foreign, "vhdkit/formats/vhdx/log.py", "from google_crc32c import value"),
    (check_foreign, "vmm/kvm/drives.py", "from qemu.qmp import QMPClient"),
    (check_foreign, "vhdkit/serve/map.py", "from PIL import Image"),
    (check_files, "vhdkit/disk.py", "open('x')"),
    (check_files, "vhdkit/cli/main.py", "import os\nos.unlink('x')"),
    (check_files, "vhdkit/serve/mount/view.py", "import ctypes"),
    (check_files, "vhdkit/serve/mount/fuse.py", "import mmap"),
    (check_files, "vhdkit/disk.py", "import os as system\nsystem.path.exists('x')"),
    (check_files, "vhdkit/disk.py", "from os.path import getsize"),
    (check_files, "vhdkit/chain/verbs/merge.py", "from pathlib import Path"),
    (check_files, "vhdkit/chain/verbs/merge.py", "import shutil"),
    (check_files, "vhdkit/formats/vhd/bat.py", "import numpy as np\nnp.fromfile('x')"),
    (check_silent, "vhdkit/disk.py", "print('x')"),
    (check_silent, "vhdkit/disk.py", "import sys\nsys.exit(1)"),
    (check_silent, "vhdkit/disk.py", "from sys import stdout"),
    (check_silent, "vmm/api/manager.py", "raise SystemExit"),
    (check_silent, "vmm/api/manager.py", "import logging\nlogging.basicConfig()"),
    (check_silent, "vhdkit/serve/nbd/server.py", "log.setLevel(10)"),
    (check_harness, "tests/harness/power.py", "import pytest"),
    (check_harness, "tests/harness/power.py", "from vhdkit.cli.main import main"),
    (check_harness, "tests/harness/power.py", "from vhdkit.store import _PROBE"),
    (check_harness, "tests/harness/power.py", "from tests.support import ROOT"),
    (check_harness, "tests/harness/power.py", "from hypothesis import strategies"),
    (check_harness, "tests/harness/injecting.py", "from vmm.store.snapshots import store"),
)
GOOD: tuple[tuple[str, str], ...] = (
    (
        "vhdkit/cli/main.py",
        "import os, sys, click\nfrom vhdkit import disk\nprint(os.environ, file=sys.stderr)",
    ),
    ("vhdkit/chain/names/opening.py", "import os\nfrom pathlib import PureWindowsPath\nos.path.join('a', 'b')"),
    ("vhdkit/store.py", "import os, fcntl\nfrom vhdkit.units import MIB\nos.open('x', 0)"),
    ("vhdkit/formats/vhd/layout.py", "import struct"),
    ("vhdkit/serve/nbd/protocol.py", "from vhdkit.serve.nbd.wire import MAGIC"),
    ("vhdkit/chain/engine/chain.py", "def open(path): ...\nopen('x')"),
    ("vmm/kvm/cmdline.py", "import vhdkit\nfrom vmm.model.errors import VmmError"),
    (
        "tests/harness/merging.py",
        "import numpy as np\nfrom tests.harness import power\nfrom vhdkit import errors",
    ),
    ("vmm/processes/rpc.py", "from vhdkit import jsonrpc"),
)


@cache
def complaints_of_rules() -> dict[Rule, list[str]]:
    """What each rule reports for all files: each file is parsed once."""
    said: dict[Rule, list[str]] = {rule: [] for rule in RULES}
    for path, source in python_files("vhdkit", "vmm", "tests/harness"):
        for rule in RULES:
            said[rule] += rule(path, source)
    return said


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    """Every file of the two packages and of the test harness follows the rule."""
    complaints = complaints_of_rules()[rule]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_can_fail(rule: Rule, path: str, source: str) -> None:
    """Self-test: the rule reports a line that breaks it."""
    assert list(rule(path, source))


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_rules_let_good_code_pass(path: str, source: str) -> None:
    """Self-test: no rule reports allowed code."""
    assert [one for rule in RULES for one in rule(path, source)] == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some path of imports from a module back to itself, or an empty list."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*way, node]):
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        if found := walk(start, []):
            return found
    return []


def test_no_import_cycles() -> None:
    """No module reaches itself through imports, so the modules can be read from the bottom up."""
    graph = {
        module_of(path): {module for _, module, _ in imports_of(path, source) if module in modules()}
        for path, source in python_files("vhdkit", "vmm")
    }
    assert find_cycle(graph) == []


def test_cycles_are_found() -> None:
    """Self-test: a cycle is found, and a diamond is not reported."""
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []
