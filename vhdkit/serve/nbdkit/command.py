# SPDX-License-Identifier: Apache-2.0
"""How nbdkit is started with our plugin: its command line, its environment, and a check of its Python.

Decides how our options are passed to nbdkit and its filters, and where its Python finds our modules. Starts nothing.

nbdkit embeds the Python with which it was built. That Python imports our modules from the folders in which they were
found here, which requires the same minor version, because numpy is compiled for one.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.chain.names.options import OpenOptions
from vhdkit.uncached import CacheMode

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin.py")
PACKAGES = "nbdkit and nbdkit-plugin-python"
_NEEDED = ("vhdkit", "numpy")
_VERSION_LINE = re.compile(r"^python_version=(\d+)\.(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class NbdkitLaunch:
    """What nbdkit is to serve: (name, absolute path) of each export; the first is the default.

    `description`: the text that clients receive for a single export, instead of the plugin's.
    `arguments` are passed to nbdkit unchanged: options, and KEY=VALUE of its filters.
    """

    exports: tuple[tuple[str, str], ...]
    options: OpenOptions
    read_only: bool = False
    overlay: bool = False
    exit_last: bool = False
    description: str | None = None
    pid_file: str | None = None
    tls_certs: str | None = None
    tls_psk: str | None = None
    tls_required: bool = False
    arguments: tuple[str, ...] = ()


def nbdkit_command(program: str, launch: NbdkitLaunch) -> list[str]:
    """The command that starts nbdkit. It listens on the sockets passed to it by LISTEN_FDS."""
    command = [program, "--foreground", "--exit-with-parent"]
    if launch.pid_file is not None:
        command.append(f"--pidfile={launch.pid_file}")
    if launch.read_only:
        command.append("--readonly")
    if launch.exit_last:
        command.append("--filter=exitlast")
    if launch.overlay:
        command.append("--filter=cow")
    if launch.tls_certs is not None or launch.tls_psk is not None:
        command.append(f"--tls={'require' if launch.tls_required else 'on'}")
    if launch.tls_certs is not None:
        command.append(f"--tls-certificates={os.path.abspath(launch.tls_certs)}")
    if launch.tls_psk is not None:
        command.append(f"--tls-psk={os.path.abspath(launch.tls_psk)}")
    return [*command, "python", PLUGIN, *_settings(launch), *launch.arguments]


def writes(launch: NbdkitLaunch) -> bool:
    """False if nbdkit itself keeps clients' writes away from the images."""
    words = launch.arguments
    protected = {"--filter=cow", "-r", "--readonly", "--read-only"} & set(words)
    in_two_words = ("--filter", "cow") in itertools.pairwise(words)
    return not (launch.read_only or launch.overlay or protected or in_two_words)


def _settings(launch: NbdkitLaunch) -> list[str]:
    """KEY=VALUE for the plugin."""
    options = launch.options
    settings = [] if launch.description is None else [f"description={launch.description}"]
    settings += [word for name, path in launch.exports for word in (f"name={name}", f"image={path}")]
    settings.append(f"access={'write' if writes(launch) else 'read'}")
    settings += [f"parent-dir={os.path.abspath(folder)}" for folder in options.parent_dirs]
    if options.allow_raw_parent:
        settings.append("allow-raw-parent=true")
    if options.ignore_bitmaps:
        settings.append("dynamic-bitmap=ignore")
    if options.cache is not CacheMode.WRITEBACK:
        settings.append(f"cache={options.cache.value}")
    if options.format_name is not None:
        settings.append(f"format={options.format_name.value}")
    return settings


def nbdkit_environment(program: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which nbdkit's Python finds our modules and its own standard library.

    The embedded Python uses the library beside the first `python3` in PATH. That must be the Python with which nbdkit
    was built, not one of a virtual environment or of another version.
    """
    changed = {name: value for name, value in environment.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    folders = [*_module_folders(), *_entries(environment.get("PYTHONPATH", ""))]
    changed["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))
    places = [os.path.dirname(program), *_entries(os.defpath), *_entries(environment.get("PATH", ""))]
    changed["PATH"] = os.pathsep.join(dict.fromkeys(place for place in places if place))
    return changed


def _entries(path: str) -> list[str]:
    return [entry for entry in path.split(os.pathsep) if entry]


def _module_folders() -> list[str]:
    """The folders in which the running Python found what the plugin needs."""
    folders = []
    for name in _NEEDED:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None, name
        folders.append(os.path.dirname(os.path.dirname(os.path.abspath(found.origin))))
    return folders


def check_python(dump: str, running: Sequence[int]) -> None:
    """Raise InvalidArgument unless nbdkit's Python has our version, as printed by `nbdkit python --dump-plugin`."""
    found = _VERSION_LINE.search(dump)
    if found is None:
        raise missing("its python plugin is not")
    theirs = int(found[1]), int(found[2])
    if theirs != (running[0], running[1]):
        raise errors.InvalidArgument(
            f"nbdkit's python plugin is built for Python {theirs[0]}.{theirs[1]}, this is Python"
            f" {running[0]}.{running[1]}: compiled modules do not work in both",
            hint=f"install vhdkit for python{theirs[0]}.{theirs[1]}, or leave out --engine nbdkit",
        )


def missing(what: str) -> errors.VhdkitError:
    """The error for nbdkit, or a part of it, that is not installed."""
    return errors.NotFound(
        f"--engine nbdkit needs nbdkit, and {what} installed",
        hint=f"install {PACKAGES} (their names in Debian and Fedora), or leave out --engine nbdkit",
    )
