# SPDX-License-Identifier: Apache-2.0
"""Where UEFI firmware is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.kvm import uefi


def test_both_files_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code without an empty variable store is not usable: the search continues at the next place."""
    places = [(str(tmp_path / f"code{number}"), str(tmp_path / f"vars{number}")) for number in range(3)]
    monkeypatch.setattr(uefi, "PLACES", tuple(places))
    assert uefi.find() is None
    (tmp_path / "code0").touch()
    (tmp_path / "vars1").touch()
    assert uefi.find() is None
    (tmp_path / "code2").touch()
    (tmp_path / "vars2").touch()
    assert uefi.find() == places[2]
    (tmp_path / "vars0").touch()
    assert uefi.find() == places[0]
