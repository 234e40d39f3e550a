# SPDX-License-Identifier: Apache-2.0
"""LUNs: valid URLs, refusals, and QEMU's own initiator against a real target."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool, run
from tests.vmm.host.fake_host import FakeHost
from tests.vmm.kvm.targets import TARGET, iscsi_target
from vmm.kvm import iscsi
from vmm.kvm.iscsi import Lun
from vmm.model.errors import InvalidSpec

IQN = "iqn.2001-04.com.example:store"


@pytest.mark.parametrize(
    ("url", "lun"),
    [
        (f"iscsi://san/{IQN}/1", Lun("san:3260", IQN, 1)),
        (f"iscsi://10.0.0.7:3261/{IQN}/0", Lun("10.0.0.7:3261", IQN, 0)),
        (f"iscsi://[fe80::1]:3261/{IQN}/0", Lun("[fe80::1]:3261", IQN, 0)),
        (f"ISCSI://san/{IQN.upper()}/16383", Lun("san:3260", IQN, 16383)),
        ("iscsi://san/iqn.2001-04.com.example%3Astore/2", Lun("san:3260", IQN, 2)),
        ("iscsi://san/iqn.2001-04.com.example/2", Lun("san:3260", "iqn.2001-04.com.example", 2)),
        ("iscsi://san/eui.02004567a425678d/2", Lun("san:3260", "eui.02004567a425678d", 2)),
        (f"iscsi://me@san/{IQN}/1?password-file=/etc/p", Lun("san:3260", IQN, 1, "me", "/etc/p")),
    ],
)
def test_valid_urls(url: str, lun: Lun) -> None:
    """Portal, target, LUN and user are read from the URL, with the protocol's default port if it has none."""
    assert iscsi.is_url(url) and iscsi.parse(url) == lun


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("iscsi:san", "does not begin"),
        ("iser://san/x/1", "does not begin"),
        (f"iscsi:///{IQN}/1", "no host"),
        (f"iscsi://san:0/{IQN}/1", "port 0"),
        (f"iscsi://san:99999/{IQN}/1", "[Pp]ort"),
        (f"iscsi://san:x/{IQN}/1", "[Pp]ort"),
        (f"iscsi://[::1/{IQN}/1", "IPv6"),
        ("iscsi://san", "/TARGET/LUN"),
        (f"iscsi://san/{IQN}", "/TARGET/LUN"),
        (f"iscsi://san/{IQN}/", "/TARGET/LUN"),
        (f"iscsi://san/{IQN}/1/2", "/TARGET/LUN"),
        ("iscsi://san/store/1", "not a valid name"),
        ("iscsi://san/iqn.2001-04.a:" + "x" * 223 + "/1", "not a valid name"),
        (f"iscsi://san/{IQN}/one", "not a number"),
        (f"iscsi://san/{IQN}/-1", "not a number"),
        (f"iscsi://san/{IQN}/16384", "not a number"),
        (f"iscsi://san/{IQN}/²", "not a number"),
        (f"iscsi://me@san/{IQN}/1", "must have both a user"),
        (f"iscsi://san/{IQN}/1?password-file=/etc/p", "must have both a user"),
        (f"iscsi://me@san/{IQN}/1?password-file=p", "absolute path"),
        (f"iscsi://san/{IQN}/1?speed=9", "only one is password-file"),
        (f"iscsi://san/{IQN}/1?speed", "without a value"),
        (f"iscsi://san/{IQN}/1#x", "must have both a user"),
    ],
)
def test_malformed_urls(url: str, says: str) -> None:
    """Each error says what is wrong, and shows a correct URL."""
    with pytest.raises(InvalidSpec, match=says):
        iscsi.parse(url)


@pytest.mark.parametrize("url", [f"iscsi://me:geheim@san/{IQN}/1", f"iscsi://me%25geheim@san/{IQN}/1"])
def test_a_password_in_the_url_is_refused_and_not_shown(url: str) -> None:
    """A password in the URL is refused, and not repeated in the error."""
    with pytest.raises(InvalidSpec, match="password-file") as caught:
        iscsi.parse(url)
    assert "geheim" not in str(caught.value)


@given(st.text(alphabet=string.printable, max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Any text after the scheme is a LUN whose identity names its target, or an InvalidSpec."""
    try:
        lun = iscsi.parse("iscsi://" + text)
    except InvalidSpec:
        return
    assert lun.target in lun.identity and lun.portal.rsplit(":", 1)[1].isdigit()


def test_the_identity_does_not_depend_on_the_portal() -> None:
    """Two paths to one LUN have the same identity; another LUN of the target has another."""
    by_name, by_address = iscsi.parse(f"iscsi://san/{IQN}/1"), iscsi.parse(f"iscsi://10.0.0.7:9/{IQN}/1")
    assert by_name.identity == by_address.identity != iscsi.parse(f"iscsi://san/{IQN}/2").identity
    (reason,) = iscsi.refusals(by_name, identities={by_address.identity: "web"})
    assert str(reason) == "belongs to the machine web" and reason.in_use
    assert iscsi.refusals(by_name, identities={f"iscsi={IQN},lun=2": "web"}) == []


def test_a_lun_that_the_host_uses_is_refused(tmp_path: Path) -> None:
    """If the host's own initiator has the LUN as a disk, the error names that disk."""
    host = FakeHost(tmp_path)
    host.disk("sdb", "iscsi")
    session = tmp_path / "sys/class/iscsi_session/session1"
    session.mkdir(parents=True)
    (session / "targetname").write_text(IQN + "\n")
    sessions = iscsi.host_sessions(root=str(tmp_path))
    assert sessions == [(IQN, 1, "/dev/sdb")]
    (reason,) = iscsi.refusals(iscsi.parse(f"iscsi://san/{IQN}/1"), identities={}, sessions=sessions)
    assert "/dev/sdb" in str(reason)
    assert iscsi.refusals(iscsi.parse(f"iscsi://san/{IQN}/2"), identities={}, sessions=sessions) == []


def test_a_host_without_an_initiator(tmp_path: Path) -> None:
    """A host without the kernel's initiator has no sessions."""
    assert iscsi.host_sessions(root=str(tmp_path)) == []


def test_each_machine_has_its_own_initiator() -> None:
    """The initiator's name is derived from the machine's id."""
    assert iscsi.initiator_name("ABC-1") == "iqn.2008-11.org.linux-kvm:abc-1" != iscsi.initiator_name("abc-2")


def qemu_io(blockdev: dict[str, object], *commands: str, secret: str = "") -> str:
    """Have QEMU's own initiator access a LUN."""
    words = [word for command in commands for word in ("-c", command)]
    objects = ["--object", secret] if secret else []
    return run([require_tool("qemu-io"), *objects, *words, "json:" + json.dumps(blockdev)]).stdout


@pytest.mark.interop
def test_qemu_reaches_the_lun(tmp_path: Path) -> None:
    """What QEMU writes to the LUN is found in the target's file."""
    with iscsi_target(tmp_path / "lun") as target:
        lun = iscsi.parse(target.url)
        assert lun.target == TARGET
        blockdev = iscsi.blockdev_of_lun("lun0", lun, initiator=iscsi.initiator_name("test"))
        qemu_io(blockdev, "write -P 0x5a 1M 64k", "flush")
        content = target.file.read_bytes()
        assert content[1 << 20 : (1 << 20) + 65536] == b"\x5a" * 65536
        assert not any(content[: 1 << 20])


@pytest.mark.interop
def test_qemu_authenticates_with_the_password(tmp_path: Path) -> None:
    """A target that requires authentication gets the user, and the password from the file."""
    password = tmp_path / "password"
    password.write_text("twelve-letters")
    with iscsi_target(tmp_path / "lun", user="me", password="twelve-letters") as target:
        url = target.url.replace("//", "//me@", 1) + f"?password-file={password}"
        lun = iscsi.parse(url)
        blockdev = iscsi.blockdev_of_lun("lun0", lun, initiator=iscsi.initiator_name("test"), secret_id="chap")
        qemu_io(blockdev, "read 0 4k", secret=f"secret,id=chap,file={lun.password_file}")
