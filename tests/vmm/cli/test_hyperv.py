# SPDX-License-Identifier: Apache-2.0
"""`vmm hyperv show`: what a person and a program see of a configuration."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from tests.support import sample
from tests.vmm.hyperv.writing import Writer, tree
from vmm.cli.main import main


def shown(*arguments: str) -> tuple[int, str, str]:
    """Exit code and both outputs of the command."""
    done = CliRunner().invoke(main, ["hyperv", "show", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_machine_is_shown() -> None:
    """Its settings, devices and ids, and the keys that are not known."""
    code, text, _ = shown(str(sample("hyperv-machines/2012r2-gen2.xml")))
    assert code == 0
    for words in (
        "generation        2",
        "Secure Boot       Microsoft Windows",
        r"scsi 0:0  VHD   C:\Disks\gen2.vhdx",
        "00:15:5d:0a:0b:02 (static)",
        "VLAN: 00000000",
        "Synthetic SCSI Controller  5C510001-0000-4000-8000-000000111111",
        "HostResources/HostResource",
    ):
        assert words in text
    code, text, _ = shown(str(sample("hyperv-machines/physical-disk.xml")))
    assert code == 0 and r"COM1: \\.\pipe\sql-com1" in text and "HDD" in text


def test_json_has_everything() -> None:
    """Bytes in hex, unknown keys with their values."""
    code, text, _ = shown(str(sample("hyperv-machines/2012r2-gen2.xml")), "--json")
    document = json.loads(text)
    assert code == 0 and document["generation"] == 2 and document["scsi_controllers"] == 2
    assert document["adapters"][0]["features"][0]["data"] == "00000000"
    assert {"key", "value"} == set(document["unknown"][0])


def test_doubts_and_control_characters_are_shown_safely(tmp_path: Path) -> None:
    """A name cannot move the cursor, and a contradiction stands beside the machine."""
    parts = {
        "properties": {"name": "a\x1b[2J", "global_id": "11111111-2222-4333-8444-555555555501"},
        "settings": {"memory": {"bank": {"size": 1024}}, "processors": {"count": 2, "weight": -1}},
    }
    (tmp_path / "a.vmcx").write_bytes(Writer().write(tree(configuration=parts)))
    code, text, aside = shown(str(tmp_path / "a.vmcx"))
    assert code == 0 and "\x1b" not in text and r"a\x1b[2J" in text
    assert "doubtful: the key settings/processors/weight is -1" in aside
