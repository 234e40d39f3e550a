# SPDX-License-Identifier: Apache-2.0
"""How a LUN's content is identified."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vmm.kvm.targets import iscsi_target
from vmm.kvm import iscsi, lun_look
from vmm.kvm.lun_look import digest_of, look_at_lun

MIB = 1 << 20
INITIATOR = iscsi.initiator_name("01234567-89ab-cdef-0123-456789abcdef")


def said(*, size: bytes = b"16 MiB", seconds: bytes = b"0.01", first: bytes = b"00") -> bytes:
    """The output of qemu-io for a LUN of zeros."""
    lines = [b"%08x:  %s 00" % (at, first) for at in range(0, 2 * MIB, 16)]
    return b"\n".join([size, *lines, b"read 2097152/2097152 bytes at offset 0", b"2 MiB, 1 ops; " + seconds])


def test_only_the_content_counts() -> None:
    """Only size and bytes make a difference, not times; if the content could not be read there is no digest."""
    one = digest_of(said())
    assert one is not None and digest_of(said(seconds=b"0.99")) == one
    assert digest_of(said(size=b"32 MiB")) != one and digest_of(said(first=b"01")) != one
    assert digest_of(b"") is None and digest_of(b"\n".join(said().splitlines()[:100])) is None


@pytest.mark.kvm
def test_the_digest_of_a_real_lun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the same until the LUN is written to; with a wrong password, or without a target, there is none."""
    require_tool("qemu-io")
    with iscsi_target(tmp_path / "lun", user="me", password="twelve-letters") as target:
        url = target.url.replace("//", "//me@", 1) + "?password-file=/absent"
        lun = iscsi.parse(url)
        known = look_at_lun(lun, initiator=INITIATOR, password=b"twelve-letters")
        assert known is not None and known == look_at_lun(lun, initiator=INITIATOR, password=b"twelve-letters")
        with target.file.open("r+b") as file:
            file.seek(MIB + 1024)
            file.write(b"mounted")
        assert look_at_lun(lun, initiator=INITIATOR, password=b"twelve-letters") not in (None, known)
        assert look_at_lun(lun, initiator=INITIATOR, password=b"another-password") is None
    monkeypatch.setattr(lun_look, "SECONDS", 1.0)  # libiscsi would retry for a long time
    assert look_at_lun(lun, initiator=INITIATOR, password=b"twelve-letters") is None
