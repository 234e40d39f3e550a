# SPDX-License-Identifier: Apache-2.0
"""Kernel settings that several switches hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.net import settings

SETTING = "net/some/setting"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The kernel's settings, as a dictionary."""
    values = {SETTING: "0"}
    monkeypatch.setattr(settings, "value", values.get)
    monkeypatch.setattr(settings, "interfaces", lambda folder: [one.split("/")[3] for one in values if "conf" in one])
    monkeypatch.setattr(settings, "write", values.__setitem__)
    yield values


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_last_holder_restores(kernel: dict[str, str], tmp_path: Path, order: str) -> None:
    """`INV-SETTING-HELD`: in whatever order they release it, and however often."""
    folder = str(tmp_path)
    for holder in "aab":
        settings.hold(folder, SETTING, "1", holder)
    settings.release(folder, SETTING, order[0])
    settings.release(folder, SETTING, order[0])
    assert kernel == {SETTING: "1"}
    settings.release(folder, SETTING, order[1])
    assert kernel == {SETTING: "0"}
    kernel[SETTING] = "5"  # no switch holds it any more
    settings.release(folder, SETTING, order[1])
    assert kernel == {SETTING: "5"}


def test_killed_before_the_setting_is_written(
    kernel: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original value is known although the writer was killed; both undoing and beginning again work."""
    folder = str(tmp_path)

    def killed(setting: str, value: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(settings, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            settings.hold(folder, SETTING, "1", "a")
    settings.hold(folder, SETTING, "1", "a")
    assert kernel == {SETTING: "1"}
    settings.release(folder, SETTING, "a")
    assert kernel == {SETTING: "0"}


FORWARDING = "net/ipv4/conf/{}/forwarding"


def test_a_value_changed_by_another_program_stays(kernel: dict[str, str], tmp_path: Path) -> None:
    """A value other than ours was set by another program. `INV-SETTING-HELD`."""
    settings.hold(str(tmp_path), SETTING, "1", "a")
    kernel[SETTING] = "2"
    settings.release(str(tmp_path), SETTING, "a")
    assert kernel == {SETTING: "2"}


@pytest.mark.parametrize(("before", "since", "left"), [("0", "1", "1"), ("0", "0", "0"), ("1", "1", "0")])
def test_a_setting_switched_on_everywhere_since_stays(
    kernel: dict[str, str], tmp_path: Path, before: str, since: str, left: str
) -> None:
    """Docker's `ip_forward` reaches the card, too, so it stays on. An earlier exception is one again.

    `INV-SETTING-HELD`.
    """
    everywhere, card = FORWARDING.format("all"), FORWARDING.format("eth0")
    kernel |= {everywhere: before, card: "0"}
    settings.hold(str(tmp_path), card, "1", "a")
    kernel[everywhere] = since
    settings.release(str(tmp_path), card, "a")
    assert kernel[card] == left


def test_new_interfaces_get_the_original_value(kernel: dict[str, str], tmp_path: Path) -> None:
    """A new interface inherits our default: the next switch must not record that as its own value, and the last one
    restores it.

    `INV-SETTING-HELD`.
    """
    names = ("all", "default", "eth0", "eth1", "eth2")
    everywhere, default, card, new, third = (FORWARDING.format(one) for one in names)
    kernel |= {everywhere: "0", default: "0", card: "1"}
    settings.hold_all(str(tmp_path), {default: "1", card: "1"}, "a")
    kernel |= {new: "1", third: "1"}
    settings.hold_all(str(tmp_path), {default: "1", card: "1", new: "1"}, "b")
    for holder in "ab":
        settings.release_all(str(tmp_path), holder, lambda name: name != SETTING)
    assert kernel == {SETTING: "0", everywhere: "0", default: "0", card: "1", new: "0", third: "0"}


def test_records_of_an_earlier_boot_are_ignored(
    kernel: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has lost our values, too: its present value is the original one."""
    folder = str(tmp_path)
    settings.hold(folder, SETTING, "1", "a")
    monkeypatch.setattr(settings, "boot_id", lambda: "another")
    kernel[SETTING] = "2"
    settings.hold(folder, SETTING, "1", "b")
    settings.release(folder, SETTING, "b")
    assert kernel == {SETTING: "2"}
    assert os.listdir(folder)
