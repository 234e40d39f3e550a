# SPDX-License-Identifier: Apache-2.0
"""`vmm host` as people and scripts use it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support import require_tool
from tests.vmm.kvm.loops import loop_device
from vmm.api import doctor
from vmm.api.doctor import Check, State
from vmm.cli.main import main


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a runtime folder for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return tmp_path


def vmm(*words: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["host", *words])


def document(*words: str) -> Any:
    """What it prints with --json."""
    result = vmm(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_without_a_verb_it_lists_the_verbs() -> None:
    """The list is a success; a wrong verb is a usage error on one line."""
    result = vmm()
    assert result.exit_code == 0 and "doctor" in result.output
    wrong = vmm("nonsense")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1


@pytest.mark.kvm
def test_info() -> None:
    """The accelerator is shown with its proof, as text and as a document."""
    require_tool("qemu-system-x86_64")
    facts = document("info")
    assert facts["accelerator"]["name"] in ("kvm", "tcg") and "ran" in facts["accelerator"]["proof"]
    assert facts["host"]["processor_count"] >= 1 and facts["features"]["qemu"] == "ok"
    assert facts["accelerator"]["proof"] in vmm("info").output


def test_info_on_a_host_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host is described all the same, with what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = document("info")
    assert facts["accelerator"] is None and "qemu-system-x86" in facts["problem"]
    assert "accelerator  none" in vmm("info").output


def test_doctor_shows_only_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Good checks are shown only with --all; the exit code says whether machines can run at all."""
    checks = [Check("a", "first", State.OK, "yes"), Check("b", "second", State.MISSING, "no", "a thing", "do it")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = vmm("doctor")
    assert result.exit_code == 0
    assert result.output == (
        "missing second: no\n"
        "        without it: a thing\n"
        "        remedy: do it\n"
        "1 of 2 checks passed; machines can run on this host\n"
    )
    assert "first" in vmm("doctor", "--all").output
    checks.append(Check("c", "third", State.MISSING, "no", "everything", "buy it", needed=True))
    assert vmm("doctor").exit_code == 1
    as_json = vmm("doctor", "--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["able"] is False


def test_disks(tmp_path: Path) -> None:
    """A device is listed with its size and identity; if it is in use, the list says why no machine can have it."""
    with loop_device(tmp_path / "file") as device:
        row = next(one for one in document("disks") if one["path"] == device)
        assert row["size_bytes"] == 16 << 20 and row["pass_through"] and row["because"] == []
        assert row["identity"] == f"file={tmp_path}/file"
        descriptor = os.open(device, os.O_RDONLY)
        try:
            line = next(one for one in vmm("disks").output.splitlines() if one.startswith(device + " "))
        finally:
            os.close(descriptor)
        assert "16.0 MiB" in line and line.rstrip().endswith("yes")
    assert all(one["path"] != device for one in document("disks"))


def test_paths() -> None:
    """Default folders are shown, set, and reset; a path that is not a folder is refused."""
    folders = document("paths")
    other = Path(folders["home"]).parent / "other"
    assert folders["disks"] == f"{folders['home']}/disks"
    refused = vmm("paths", "set", "disks", str(other))
    assert refused.exit_code == 2 and "is not a folder" in refused.stderr
    other.mkdir()
    assert vmm("paths", "set", "disks", str(other)).exit_code == 0
    assert document("paths")["disks"] == str(other)
    assert vmm("paths", "set", "disks", "--default").exit_code == 0
    assert document("paths") == folders


@pytest.mark.parametrize(
    "words", [("set", "nonsense", "/tmp"), ("set", "disks"), ("set", "disks", "/tmp", "--default"), ("set",)]
)
def test_wrong_paths(words: tuple[str, ...]) -> None:
    """A wrong key, and a folder together with --default or neither of them, are usage errors on one line."""
    result = vmm("paths", *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not result.stdout


def test_autostart_prints_the_unit() -> None:
    """--print shows what would be installed, and installs nothing."""
    text = vmm("autostart", "--print", "--system").output
    assert text.count("[Service]") == 1 and "host autostart --start-machines" in text


@pytest.mark.parametrize("action", ["--start-machines", "--stop-machines"])
def test_nothing_to_start_or_stop(action: str) -> None:
    """On a host without machines there is nothing to do, which counts as success."""
    assert document("autostart", action) == []
