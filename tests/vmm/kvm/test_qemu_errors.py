# SPDX-License-Identifier: Apache-2.0
"""Known error messages of QEMU, translated for users."""

from __future__ import annotations

import pytest

from vmm.kvm.qemu_errors import explain, reason_of


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (
            "disk-1: iSCSI: Failed to connect to LUN : SENSE KEY:ILLEGAL_REQUEST(5) "
            "ASCQ:LOGICAL_UNIT_NOT_SUPPORTED(0x2500)",
            "disk-1: the target has no such LUN",
        ),
        (
            "disk-1: iSCSI: Failed to connect to LUN : Failed to log in to target. Status: Target not found(515)",
            "disk-1: the target does not exist, or does not admit this machine",
        ),
        (
            "disk-1: iSCSI: Failed to connect to LUN : Failed to log in to target. "
            "Status: Authentication failure(513)",
            "disk-1: the target does not let this machine log in: the user or the password is wrong",
        ),
        (
            "disk-1: iSCSI: Failed to connect to LUN : iscsi_service failed with : Can not reconnect right now.",
            "disk-1: the target cannot be reached: it does not answer",
        ),
        (
            "cannot set up guest memory 'pc.ram': Cannot allocate memory",
            "this host has not enough free memory for the machine",
        ),
        ("unable to find CPU model 'Nonsense'", "QEMU has no processor model 'Nonsense'"),
        (
            "Property 'qemu64-x86_64-cpu.nonsense' not found",
            "the processor model has no such feature: nonsense",
        ),
        ('Failed to get "write" lock', "another program uses it"),
        ("failed to initialize kvm: Permission denied", "KVM cannot be used: Permission denied"),
        (
            "Bus 'ide.0' does not support hotplugging",
            "devices cannot be added or removed there while the machine runs",
        ),
    ],
)
def test_known_messages(words: str, meaning: str) -> None:
    """The translation says what the message means, and which disk it is about."""
    found = explain(words)
    assert found is not None and found[0] == meaning


def test_an_unknown_message() -> None:
    """It is not repeated: the caller's error refers to the log."""
    assert explain("Assertion 0 != 1 failed in virtio_frobnicate") is None
    assert reason_of({}) == "QEMU could not write all of it"
    assert "frobnicate" not in reason_of({"error-desc": "cannot frobnicate"})
    assert (
        reason_of({"error-desc": "Unable to write: No space left on device"}) == "no space is left on the file system"
    )
