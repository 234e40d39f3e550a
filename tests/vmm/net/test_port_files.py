# SPDX-License-Identifier: Apache-2.0
"""Records of a bridge's ports: written, read, removed; a port with a damaged record lets its guest send nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmm.model import errors
from vmm.net import port_files
from vmm.net.engine import PortRules
from vmm.net.ports import PortSetup

SETUP = PortSetup("vm.nic-0", "/switch", "/guest", rules=PortRules(addresses=frozenset({b"abcdef"})))
TAP = "lo"  # an interface that every host has


def test_a_port_is_recorded_until_it_is_removed(tmp_path: Path) -> None:
    """A record exists where the tap does; the record of another tap is removed by the holder of the lock."""
    folder = str(tmp_path / "ports")
    assert port_files.read_all(folder) == []
    port_files.write(folder, TAP, SETUP)
    port_files.write(folder, "vt-none", SETUP)
    (found,) = port_files.read_all(folder)
    assert (found.interface, found.setup) == (TAP, SETUP)
    assert port_files.is_readable(folder, TAP) and not port_files.is_readable(folder, "vt-other")
    assert (tmp_path / "ports" / "vt-none.json").exists()
    port_files.read_all(folder, remove_stale=True)
    assert not (tmp_path / "ports" / "vt-none.json").exists()
    port_files.remove(folder, TAP)
    port_files.remove(folder, TAP)
    assert port_files.read_all(folder) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7", "JSON object"),
        ("{}", "another interface"),
        ('{"interface": "eth9"}', "another interface"),
        ('{"interface": "lo"}', "a port must be a JSON object"),
        ('{"interface": "lo", "port": [["name", 1]]}', "a port must be a JSON object"),
        ('{"interface": "lo", "port": {"name": 7}}', "name"),
        ('{"interface": "lo", "port": {"name": "\\ud800", "address": "a", "peer": "p"}}', "name"),
        ('{"interface": "lo", "port": {"colour": "red"}}', "has no setting 'colour'"),
        ('{"interface": "lo", "port": {"macs": {}}}', "macs"),
        ('{"interface": "lo", "port": {"mode": []}}', ""),
        ('{"interface": "lo", "port": {"vlan": 1e999}}', "vlan"),
    ],
)
def test_a_damaged_record_is_reported(tmp_path: Path, content: str, words: str) -> None:
    """It stands for an unknown port, with what is wrong."""
    (tmp_path / "lo.json").write_text(content)
    (found,) = port_files.read_all(str(tmp_path))
    assert found.setup is None and words in found.problem
    assert not port_files.is_readable(str(tmp_path), TAP)


def test_other_files_in_the_folder_of_records(tmp_path: Path) -> None:
    """A folder, a pipe and a huge file are damaged records; other names are skipped."""
    for name in ("README", "x y.json", ".lo.json", f"{'x' * 20}.json"):
        (tmp_path / name).write_text("{}")
    os.mkdir(tmp_path / "lo.json")
    (found,) = port_files.read_all(str(tmp_path), remove_stale=True)
    assert found.problem == "it is not a regular file"
    with pytest.raises(errors.VmmError, match="forget the port"):
        port_files.remove(str(tmp_path), TAP)
    os.rmdir(tmp_path / "lo.json")
    os.mkfifo(tmp_path / "lo.json")
    assert port_files.read_all(str(tmp_path))[0].problem == "it is not a regular file"
    os.unlink(tmp_path / "lo.json")
    with open(tmp_path / "lo.json", "wb") as file:
        file.truncate(1 << 40)
    assert "larger than" in port_files.read_all(str(tmp_path))[0].problem
    (tmp_path / "file").write_text("")
    assert port_files.read_all(str(tmp_path / "file")) == []


def test_the_record_format_is_that_of_every_version(tmp_path: Path) -> None:
    """It is JSON, as every version has written it."""
    port_files.write(str(tmp_path), TAP, SETUP)
    document = json.loads((tmp_path / "lo.json").read_text())
    assert set(document) == {"interface", "port"} and document["port"]["macs"] == ["61:62:63:64:65:66"]
