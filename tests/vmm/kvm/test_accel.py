# SPDX-License-Identifier: Apache-2.0
"""The choice of the accelerator: a table of outcomes, and the real trial with its cache."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import require_tool
from vmm.kvm import accel, program
from vmm.kvm.accel import Evidence
from vmm.kvm.trial import TrialResult
from vmm.model.errors import InvalidSpec, Unsupported

SOUND = TrialResult(None, None, ["SSE2", "page fault"], {}, [], 4000)
ALL_WELL = Evidence("/usr/bin/qemu", "7.2.22", SOUND, None, None)
EMULATING = replace(ALL_WELL, kvm=replace(SOUND, failed={"SSE2": "KVM cannot emulate an instruction"}))
NO_NODE = replace(ALL_WELL, kvm=TrialResult(refused=os.strerror(2)), qemu_kvm="not tried")
NO_ACCESS = replace(ALL_WELL, kvm=TrialResult(refused=os.strerror(13)), qemu_kvm="not tried")
QEMU_CANNOT = replace(ALL_WELL, qemu_kvm="this QEMU was built without kvm")
DEAD = replace(ALL_WELL, kvm=TrialResult(refused=None, real_mode="a wrong result"), qemu_kvm="not tried")
NO_TCG = replace(ALL_WELL, qemu_tcg="this QEMU was built without tcg")


def test_sound_kvm_is_chosen_with_its_proof() -> None:
    """If every step ran, machines get KVM, and the proof names what ran."""
    chosen = accel.choose(ALL_WELL)
    assert (chosen.name, chosen.problem, chosen.hint) == ("kvm", None, None)
    assert "SSE2" in chosen.proof and "7.2.22" in chosen.proof


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (EMULATING, "SSE2"),
        (NO_NODE, "No such file"),
        (NO_ACCESS, "Permission denied"),
        (QEMU_CANNOT, "built without kvm"),
        (DEAD, "wrong result"),
    ],
)
def test_tcg_is_chosen_otherwise_with_the_reason(evidence: Evidence, reason: str) -> None:
    """If a step did not run, machines get TCG automatically, with the reason why not KVM."""
    chosen = accel.choose(evidence)
    assert chosen.name == "tcg" and chosen.problem is not None and reason in chosen.problem


def test_a_partial_kvm_can_be_forced() -> None:
    """A KVM that lacks only what kernels need can be requested, and leads to a warning."""
    chosen = accel.choose(EMULATING, "kvm")
    assert chosen.name == "kvm" and chosen.problem is not None and "SSE2" in chosen.problem
    assert "SSE2" not in chosen.proof.replace(chosen.problem, "").split("64-bit kernel mode")[0]


@pytest.mark.parametrize("evidence", [NO_NODE, NO_ACCESS, QEMU_CANNOT, DEAD])
def test_a_kvm_that_runs_nothing_cannot_be_forced(evidence: Evidence) -> None:
    """Requesting a KVM that runs nothing is an error; another accelerator is not used instead."""
    with pytest.raises(Unsupported, match="KVM cannot be used"):
        accel.choose(evidence, "kvm")


def test_hints_say_what_to_do() -> None:
    """A missing node and a missing permission have different remedies."""
    assert "modprobe" in (accel.choose(NO_NODE).hint or "")
    assert "usermod" in (accel.choose(NO_ACCESS).hint or "")


def test_without_tcg() -> None:
    """A QEMU without TCG can still run KVM; without both there is an error."""
    assert accel.choose(NO_TCG).name == "kvm"
    for evidence, wanted in ((NO_TCG, "tcg"), (replace(NO_NODE, qemu_tcg="gone"), "auto")):
        with pytest.raises(Unsupported, match="TCG"):
            accel.choose(evidence, wanted)


def test_unknown_accelerator() -> None:
    """An unknown word is refused, with a list of the known ones."""
    with pytest.raises(InvalidSpec, match="auto, kvm, tcg"):
        accel.choose(ALL_WELL, "xen")


@pytest.mark.kvm
def test_real_machine_runs_a_guest(tmp_path: Path) -> None:
    """Whatever this machine has, the chosen accelerator has run a guest, and is remembered in a private file."""
    require_tool("qemu-system-x86_64")
    first = accel.gather(cache_folder=str(tmp_path))
    assert first.qemu_tcg is None
    cache = tmp_path / accel.CACHE_NAME
    assert cache.stat().st_mode & 0o777 == 0o600
    assert accel.gather(cache_folder=str(tmp_path)) == first
    assert os.listdir(tmp_path) == [accel.CACHE_NAME]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A host on which trials are faked; each real trial would add its name."""
    tried: list[str] = []

    def outcome() -> TrialResult:
        tried.append("kvm")
        return SOUND

    monkeypatch.setattr(accel, "kvm_trial", outcome)
    monkeypatch.setattr(accel, "_qemu_trial", lambda found, name: None)
    monkeypatch.setattr(program, "inspect", lambda path: program.Program(path, "9.9", ("kvm", "tcg")))
    return tried


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": "KEY", "evidence": {"kvm": 3}}', "null"])
def test_a_damaged_cache_leads_to_a_new_trial(content: str, counted: list[str], tmp_path: Path) -> None:
    """A truncated or foreign cache file is replaced; it is never believed and never an error."""
    cache = tmp_path / accel.CACHE_NAME
    cache.write_text(content)
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/sh")
    assert counted == ["kvm"]
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/sh")
    assert counted == ["kvm"]


def test_the_cache_is_valid_only_for_its_circumstances(counted: list[str], tmp_path: Path) -> None:
    """With another QEMU, after a reboot, or on request, the trial runs again."""
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/sh")
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/ls")
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/ls", refresh=True)
    cache = tmp_path / accel.CACHE_NAME
    document = json.loads(cache.read_text())
    document["key"] = document["key"].replace("|", "|another-boot", 1)
    cache.write_text(json.dumps(document))
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/ls")
    assert len(counted) == 4


def test_a_cache_that_cannot_be_written_is_not_an_error(counted: list[str], tmp_path: Path) -> None:
    """Without a folder for the cache, the trial still succeeds."""
    accel.gather(cache_folder=str(tmp_path / "none"), qemu="/bin/sh")
    assert counted == ["kvm"]


def test_a_trial_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM that hangs delays the command only by the time limit."""
    monkeypatch.setattr(accel, "_TRIAL_PROGRAM", "import time; time.sleep(60)")
    started = time.monotonic()
    outcome = accel.kvm_trial(timeout_seconds=0.2)
    assert outcome.refused == "the trial did not end in time" and time.monotonic() - started < 30


def test_a_slow_trial_is_not_cached(counted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An outcome that is due only to a busy machine is not kept."""
    monkeypatch.setattr(accel, "kvm_trial", lambda: TrialResult(refused="the trial did not end in time"))
    accel.gather(cache_folder=str(tmp_path), qemu="/bin/sh")
    assert not (tmp_path / accel.CACHE_NAME).exists()


def test_a_trial_with_malformed_output_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that dies or prints something unexpected is reported."""
    for text in ("print('hello')", "import os; os.kill(os.getpid(), 9)"):
        monkeypatch.setattr(accel, "_TRIAL_PROGRAM", text)
        assert "did not report" in (accel.kvm_trial().refused or "")
