# SPDX-License-Identifier: Apache-2.0
"""How nbdkit is started: arguments and environment, without starting it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import vhdkit
from vhdkit.serve.nbdkit.command import PLUGIN, NbdkitLaunch, check_python, nbdkit_command, nbdkit_environment, writes

NBDKIT = "/opt/kit/bin/nbdkit"
DUMP = "path=/usr/lib/nbdkit/plugins/nbdkit-python-plugin.so\nname=python\nversion=1.32.5\npython_version={}\n"


def launch(*arguments: str, overlay: bool = False) -> NbdkitLaunch:
    """One image under one name."""
    return NbdkitLaunch((("disk", "/d/disk.vhd"),), vhdkit.OpenOptions(), overlay=overlay, arguments=arguments)


def test_plain_command() -> None:
    """nbdkit stays in the foreground, ends with its parent, and opens the image for writing at once."""
    assert nbdkit_command(NBDKIT, launch()) == [
        NBDKIT, "--foreground", "--exit-with-parent",
        "python", PLUGIN, "name=disk", "image=/d/disk.vhd", "access=write",
    ]  # fmt: skip
    assert Path(PLUGIN).is_file()


def test_every_option_has_its_argument() -> None:
    """Each option of `serve` reaches nbdkit, its filters and the plugin; what follows is passed on unchanged."""
    options = vhdkit.OpenOptions(
        parent_dirs=("/p q",), allow_raw_parent=True, ignore_bitmaps=True, format_name="vhd", cache="none"
    )
    exports = (("a=b", "/d/1 2.vhd"), ("", "/d/2.vhd"))
    words = nbdkit_command(
        NBDKIT,
        NbdkitLaunch(
            exports, options, read_only=True, exit_last=True, pid_file="/run/pid", arguments=("--filter=log", "x=y")
        ),
    )
    assert words[3:6] == ["--pidfile=/run/pid", "--readonly", "--filter=exitlast"]
    assert words[6:] == [
        "python", PLUGIN, "name=a=b", "image=/d/1 2.vhd", "name=", "image=/d/2.vhd", "access=read", "parent-dir=/p q",
        "allow-raw-parent=true", "dynamic-bitmap=ignore", "cache=none", "format=vhd", "--filter=log", "x=y",
    ]  # fmt: skip


def test_tls() -> None:
    """Certificates and keys are passed to nbdkit; unencrypted clients are admitted unless that is refused."""
    certs = NbdkitLaunch((), vhdkit.OpenOptions(), tls_certs="/c", tls_required=True)
    assert nbdkit_command(NBDKIT, certs)[3:5] == ["--tls=require", "--tls-certificates=/c"]
    keys = NbdkitLaunch((), vhdkit.OpenOptions(), tls_psk="/keys.psk")
    assert nbdkit_command(NBDKIT, keys)[3:5] == ["--tls=on", "--tls-psk=/keys.psk"]


def test_overlay_is_the_cow_filter() -> None:
    """With an overlay the images are opened read-only and the filter keeps the writes."""
    words = nbdkit_command(NBDKIT, launch(overlay=True))
    assert "--filter=cow" in words and "access=read" in words


@pytest.mark.parametrize("arguments", [("--filter=cow",), ("--filter", "cow"), ("-r",), ("--readonly",)])
def test_arguments_that_protect_the_image(arguments: tuple[str, ...]) -> None:
    """If nbdkit's own arguments prevent writes, the image is opened read-only."""
    assert not writes(launch(*arguments))
    assert writes(launch("--filter", "log", "cow=1"))


def test_environment() -> None:
    """Our modules come first, the Python beside nbdkit before any other, and ours is not forced on it."""
    before = {
        "PATH": "/venv/bin:/usr/bin",
        "PYTHONPATH": "/mine",
        "PYTHONHOME": "/x",
        "VIRTUAL_ENV": "/venv",
        "A": "b",
    }
    after = nbdkit_environment(NBDKIT, before)
    assert after["A"] == "b" and "PYTHONHOME" not in after and "VIRTUAL_ENV" not in after
    places = after["PATH"].split(os.pathsep)
    assert places[0] == "/opt/kit/bin" and places.index("/usr/bin") < places.index("/venv/bin")
    folders = after["PYTHONPATH"].split(os.pathsep)
    assert folders[-1] == "/mine" and len(folders) == len(set(folders))
    for module in ("vhdkit", "numpy"):
        assert any((Path(folder) / module / "__init__.py").exists() for folder in folders), module


def test_same_minor_version() -> None:
    """Another release of the same minor version is accepted, another minor version is refused with both numbers."""
    check_python(DUMP.format("3.11.1"), (3, 11, 9))
    with pytest.raises(vhdkit.InvalidArgument, match=r"built for Python 3\.12, this is Python 3\.11") as caught:
        check_python(DUMP.format("3.12.0"), (3, 11, 9))
    assert "python3.12" in str(caught.value)
    check_python(DUMP.format(sys.version.split()[0]), sys.version_info[:2])


def test_no_python_plugin() -> None:
    """If nbdkit does not find the plugin, its package is named."""
    with pytest.raises(vhdkit.NotFound, match="nbdkit-plugin-python"):
        check_python("nbdkit: error: cannot open plugin 'python'", (3, 11))
