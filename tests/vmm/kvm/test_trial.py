# SPDX-License-Identifier: Apache-2.0
"""The trial on /dev/kvm: the real device does what the trial requests, and any failure is reported, never raised."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import not_available
from vmm.kvm import trial, trial_guest

needs_kvm = pytest.mark.kvm


def require_kvm() -> None:
    """Skip the test if /dev/kvm may not be used."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        not_available("needs read and write access to /dev/kvm")


@needs_kvm
def test_real_mode_guest_runs() -> None:
    """KVM runs the real-mode guest, and every other step is accounted for exactly once."""
    require_kvm()
    outcome = trial.run_trial()
    assert outcome.refused is None and outcome.real_mode is None
    names = [step.name for step in trial_guest.LONG_STEPS]
    assert sorted([*outcome.done, *outcome.failed, *outcome.left_out]) == sorted(names)
    assert "64-bit arithmetic" in outcome.done


@needs_kvm
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("e6e1e6e0f4", "a wrong result"),
        ("b006e6e2f4", "exception 6"),
        ("f4", "it halted too early"),
        ("e6e0e6e0f4", "a wrong result"),
        ("e655f4", "a wrong result"),
    ],
)
def test_a_failing_guest_is_detected(code: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that reports a wrong result, traps, or halts without a report is a failure with its reason."""
    require_kvm()
    step = trial_guest.GuestStep("real mode", "", bytes.fromhex(code))
    whole = trial_guest.memory_image(step)
    memory = bytearray(whole)
    start = trial_guest.CODE
    memory[start : start + len(step.code) + 3] = step.code + b"\xf4\xf4\xf4"
    monkeypatch.setattr(trial_guest, "REAL_STEP", step)
    monkeypatch.setattr(trial_guest, "memory_image", lambda given: bytes(memory) if given is step else whole)
    assert trial.run_trial().real_mode == says


def test_a_missing_device(tmp_path: Path) -> None:
    """It is reported with the system's message."""
    outcome = trial.run_trial(str(tmp_path / "kvm"))
    assert outcome.refused == os.strerror(2) and outcome.real_mode is not None


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_that_is_not_kvm(device: str) -> None:
    """It refuses the first request."""
    refused = trial.run_trial(device).refused
    assert refused is not None and "refused" in refused


def test_no_descriptor_is_left() -> None:
    """Whatever happens, the trial closes everything that it opened."""
    before = set(os.listdir("/proc/self/fd"))
    trial.run_trial()
    trial.run_trial("/dev/null")
    assert set(os.listdir("/proc/self/fd")) == before


def test_outcome_survives_json() -> None:
    """The line that the process prints can be read back as the outcome."""
    outcome = trial.TrialResult(None, None, ["SSE2"], {"a": "b"}, ["c"], 7)
    assert trial.TrialResult(**json.loads(outcome.to_json())) == outcome
