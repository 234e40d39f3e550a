# SPDX-License-Identifier: Apache-2.0
"""Missing parts are found, with what stops working and what helps; parts that are present are not reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import require_tool
from vmm.api import doctor
from vmm.api.doctor import Check, State
from vmm.host import kernel
from vmm.kvm import accel, program, userfault
from vmm.kvm.accel import Accelerator
from vmm.kvm.userfault import Way
from vmm.model import paths
from vmm.model.errors import Unsupported


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home and a runtime folder for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return tmp_path


def only(examiner: str, key: str) -> Check:
    """The check with that key, from one examiner."""
    find: Callable[[], object] = getattr(doctor, f"_check_{examiner}")
    checks: list[Check] = list(find())  # type: ignore[call-overload]
    return next(check for check in checks if check.key == key)


def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host without any program."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(kernel, "program_path", lambda: str(empty))


def test_every_check_is_complete() -> None:
    """On any host each check has a unique key, and a failed one says what stops working and what helps."""
    checks = doctor.examine()
    assert len({check.key for check in checks}) == len(checks)
    for check in checks:
        assert check.title and check.found
        assert (check.state is State.OK) == (not check.without)
        assert check.state is State.OK or check.key == "capture" or check.remedy


def test_examining_makes_no_folders(places: Path) -> None:
    """Examining the host creates neither the home nor the runtime folder."""
    doctor.examine()
    assert sorted(one.name for one in places.iterdir()) == []


def test_a_host_without_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without QEMU and the others no check fails with an exception: everything is reported, and no machine can run."""
    no_programs(monkeypatch, tmp_path)
    checks = doctor.examine()
    missing = {check.key for check in checks if check.state is State.MISSING}
    assert {"qemu", "setpriv", "kvm", "iscsi", "bridge", "dhcp"} <= missing
    assert not doctor.is_able(checks)
    qemu = next(check for check in checks if check.key == "qemu")
    assert "qemu-system-x86" in (qemu.remedy or "") and qemu.without == "no machine can be started"


def test_optional_parts_do_not_keep_machines_from_running() -> None:
    """A part that only some machines need does not keep others from running."""
    optional = Check("a", "a", State.MISSING, "-", "b", "c")
    limited = Check("b", "b", State.LIMITED, "-", "b", "c", needed=True)
    needed = Check("c", "c", State.MISSING, "-", "b", "c", needed=True)
    assert doctor.is_able([optional, limited]) and not doctor.is_able([optional, needed])


def test_old_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that is too old counts as missing; the oldest supported one is accepted."""
    monkeypatch.setattr(program, "find", lambda: "/usr/bin/qemu")
    for version, state in (("6.2.0", State.MISSING), ("7.2.0", State.OK), ("10.0.2", State.OK)):
        monkeypatch.setattr(program, "inspect", lambda path, v=version: program.Program(path, v, ("tcg",)))
        assert only("qemu", "qemu").state is state


def test_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM is good, a KVM for boot sectors only is limited, no KVM is a fault, and without any accelerator no machine
    can run."""
    cases = (
        (Accelerator("kvm", "ran"), State.OK),
        (Accelerator("tcg", "ran", f"KVM is not used: {accel.KERNEL_WORDS} it fails", "do"), State.LIMITED),
        (Accelerator("tcg", "ran", "KVM is not used: no device", "do"), State.MISSING),
    )
    for accelerator, state in cases:
        monkeypatch.setattr(accel, "probe", lambda a=accelerator, **more: a)
        check = only("accelerator", "kvm")
        assert check.state is state and not check.needed

    def none(**more: object) -> Accelerator:
        raise Unsupported("nothing runs", hint="buy another")

    monkeypatch.setattr(accel, "probe", none)
    check = only("accelerator", "kvm")
    assert check.state is State.MISSING and check.needed and check.remedy == "buy another"


@pytest.mark.parametrize(
    ("problem", "way", "state", "words"),
    [
        (None, Way.EVERYBODY, State.OK, "every machine"),
        (None, Way.DEVICE, State.LIMITED, "needs no other privilege"),
        (None, Way.CAPABILITY, State.LIMITED, "a guest that escapes"),
        ("userfaultfd: no", Way.CAPABILITY, State.MISSING, "userfaultfd: no"),
    ],
)
def test_capture(problem: str | None, way: Way, state: State, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving memory while the guest runs: which right allows it, and what that right would allow other programs."""
    monkeypatch.setattr(kernel, "write_protecting_userfaultfd", lambda: problem)
    monkeypatch.setattr(userfault, "best_way", lambda: way)
    check = only("capture", "capture")
    assert check.state is state and words in check.found


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bridges there are no VLANs on them either; a missing tool and a missing part of the kernel are
    distinguished."""
    monkeypatch.setattr(kernel, "device", lambda path: f"{path}: No such file or directory")
    monkeypatch.setattr(kernel, "bridge", lambda: "this host has no command ip")
    monkeypatch.setattr(kernel, "bridge_guards", lambda: "Operation not supported")
    assert only("network", "bridge").remedy == doctor.install("iproute2")
    assert only("network", "bridge-vlan").found == "bridges are not available"
    assert "kernel" in (only("network", "bridge-guard").remedy or "")
    assert "modprobe tun" in (only("network", "tun").remedy or "")
    assert only("network", "vhost-net").state is State.LIMITED


@pytest.mark.parametrize(
    ("problem", "helps"),
    [
        ("this host has no command unshare", "util-linux"),
        ("this host has no command nft", "nftables"),
        ("/dev/x: No such file or directory", "the usual"),
        ("/dev/x: Permission denied", "the right"),
        (None, "the usual"),
    ],
)
def test_the_remedy_matches_the_cause(problem: str | None, helps: str) -> None:
    """A missing command needs its package, an inaccessible device a right, anything else the usual step."""
    assert helps in doctor._helps_with(problem, "the usual", "the right")


def test_folders(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home below a file cannot be made; one below our own folder can."""
    assert only("folders", "home").state is State.OK
    (places / "file").write_text("")
    monkeypatch.setenv("VMM_HOME", str(places / "file" / "home"))
    check = only("folders", "home")
    assert check.state is State.MISSING and check.needed and "VMM_HOME" in (check.remedy or "")


def test_iscsi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QEMU's module for iSCSI is found if it is installed, and reported if it is not."""
    require_tool("qemu-img")
    assert only("iscsi", "iscsi").state is State.OK
    tool = tmp_path / "qemu-img"
    tool.write_text("#!/bin/sh\necho \"Could not open 'iscsi://': Unknown protocol 'iscsi'\" >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(kernel, "program_path", lambda: str(tmp_path))
    check = only("iscsi", "iscsi")
    assert check.state is State.MISSING and "qemu-block-extra" in (check.remedy or "")


def test_cache_only_where_it_is_private(places: Path) -> None:
    """The outcome of the trial is kept only in an existing runtime folder that belongs to us."""
    assert doctor.cache_folder() is None
    (places / "run").symlink_to("/tmp")
    assert doctor.cache_folder() is None
    (places / "run").unlink()
    paths.make_private(str(places / "run"))
    assert doctor.cache_folder() == str(places / "run")
