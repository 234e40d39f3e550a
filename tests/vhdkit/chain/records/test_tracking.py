# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's change tracking beside an image: opening the image for writing warns, and reading does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from vhdkit.chain.records.tracking import SUFFIXES, TRACKED
from vhdkit.units import MIB


@pytest.fixture(params=["dynamic", "vhdx"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image."""
    path = tmp_path / ("disk.vhdx" if request.param == "vhdx" else "disk.vhd")
    vhdkit.create_image(path, 4 * MIB, disk_format=request.param)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_opening_for_writing_warns(image: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    """Both files count; the warning is a finding of the disk and a line in the log, and the file stays as it is."""
    beside = image.with_name(image.name + suffix)
    beside.write_bytes(b"tracked")
    with vhdkit.open_disk(image) as disk:
        assert disk.findings == ()
    assert caplog.records == []
    with vhdkit.open_disk(image, writable=True) as disk:
        [finding] = disk.findings
        disk.write(0, b"x")
    assert finding.code == TRACKED and finding.severity is vhdkit.Severity.WARNING
    assert beside.name in finding.message and "full one" in finding.message
    assert [record.levelname for record in caplog.records] == ["WARNING"] and beside.name in caplog.text
    assert beside.read_bytes() == b"tracked"


def test_other_files_beside_an_image_do_not_matter(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of another image, and folders, are no change tracking of this one."""
    image.with_name("other.vhdx.rct").touch()
    image.with_suffix(".rct").touch()
    image.with_name(image.name + ".mrt").mkdir()
    with vhdkit.open_disk(image, writable=True) as disk:
        assert disk.findings == ()
    assert caplog.records == []


def test_verbs_that_change_an_image_warn(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So do other verbs than those that open a disk: here one that records another parent's name."""
    child = image.with_name(f"child{image.suffix}")
    vhdkit.create_child(child, image)
    child.with_name(child.name + ".rct").touch()
    vhdkit.rebase(child, image)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
