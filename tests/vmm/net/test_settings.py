# SPDX-License-Identifier: Apache-2.0
"""Settings that several switches hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.net import settings

SETTING = "some/setting"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The kernel's settings, as a dictionary."""
    values = {SETTING: "0"}
    monkeypatch.setattr(settings, "_read", values.get)
    monkeypatch.setattr(settings, "write", values.__setitem__)
    yield values


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_last_one_puts_back(kernel: dict[str, str], tmp_path: Path, order: str) -> None:
    """`INV-SETTING-HELD`: in whatever order they let go, and however often each says so."""
    folder = str(tmp_path)
    for holder in "aab":
        settings.hold(folder, SETTING, "1", holder)
    settings.release(folder, SETTING, order[0])
    settings.release(folder, SETTING, order[0])
    assert kernel == {SETTING: "1"}
    settings.release(folder, SETTING, order[1])
    assert kernel == {SETTING: "0"}
    kernel[SETTING] = "5"  # nobody's business any more
    settings.release(folder, SETTING, order[1])
    assert kernel == {SETTING: "5"}


def test_killed_before_the_setting_is_written(
    kernel: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was before is known although the writer was killed; taking back and beginning again both work."""
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


def test_an_earlier_boot_is_forgotten(kernel: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has forgotten it, too: what is there now is what was before."""
    folder = str(tmp_path)
    settings.hold(folder, SETTING, "1", "a")
    monkeypatch.setattr(settings, "boot_id", lambda: "another")
    kernel[SETTING] = "2"
    settings.hold(folder, SETTING, "1", "b")
    settings.release(folder, SETTING, "b")
    assert kernel == {SETTING: "2"}
    assert os.listdir(folder)
