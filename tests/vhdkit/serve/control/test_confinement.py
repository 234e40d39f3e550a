# SPDX-License-Identifier: Apache-2.0
"""Which paths of a control owner are taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vhdkit import errors
from vhdkit.guarded import unguarded
from vhdkit.serve.control.confinement import confined_to


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder to be confined to, with an image and a folder in it, and things that lead out of it."""
    room = tmp_path / "room"
    (room / "below").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path in (room / "a.vhd", room / "below" / "b.vhd", tmp_path / "other" / "c.vhd"):
        path.write_bytes(b"x")
    (room / "out").symlink_to(tmp_path / "other")
    (room / "out.vhd").symlink_to(tmp_path / "other" / "c.vhd")
    (room / "in.vhd").symlink_to("below/b.vhd")
    (room / "dangling").symlink_to("nowhere")
    os.mkfifo(room / "pipe")
    (tmp_path / "alias").symlink_to(room)
    return room


def test_images_inside(scene: Path) -> None:
    """INV-CONTROL-CONFINED: by any spelling that ends in the folder, also when the folder was named by a link."""
    confined = confined_to([str(scene.parent / "alias")])
    for path in ("a.vhd", "below/../a.vhd", "./a.vhd", "below/b.vhd", "in.vhd"):
        for room in (scene, scene.parent / "alias"):
            real = confined.image(os.path.join(room, path))
            assert real == os.path.realpath(os.path.join(scene, path))


@pytest.mark.parametrize("path", ["out.vhd", "out/c.vhd", "../other/c.vhd", "../../etc/passwd", "..", ""])
def test_images_outside(scene: Path, path: str) -> None:
    """INV-CONTROL-CONFINED: whatever leads out is refused, whether something is there or not."""
    confined = confined_to([str(scene)])
    with pytest.raises((errors.AccessDenied, errors.InvalidArgument)):
        confined.image(os.path.join(scene, path))
    with pytest.raises(errors.AccessDenied):
        confined_to([]).image(str(scene / "a.vhd"))


def test_what_is_no_image(scene: Path) -> None:
    """A relative path, nothing, a folder, a pipe (which is not opened): typed errors."""
    confined = confined_to([str(scene)])
    for path in ("a.vhd", str(scene / "pipe"), str(scene / "below"), "/a\0b"):
        with pytest.raises(errors.InvalidArgument):
            confined.image(path)
    for path in ("gone.vhd", "dangling", "a.vhd/x"):
        with pytest.raises(errors.NotFound):
            confined.image(str(scene / path))


def test_new_files(scene: Path) -> None:
    """INV-CONTROL-CONFINED: a new file lies in a folder inside, links followed first."""
    confined = confined_to([str(scene)])
    assert confined.new_file(str(scene / "n.avhd")) == str(scene / "n.avhd")
    assert confined.new_file(str(scene / "below" / ".." / "below" / "n.avhd")) == str(scene / "below" / "n.avhd")
    for path in ("out/n.avhd", "../n.avhd", "below/../../n.avhd"):
        with pytest.raises(errors.AccessDenied):
            confined.new_file(os.path.join(scene, path))
    for path in ("", "below/..", "below/."):
        with pytest.raises(errors.InvalidArgument):
            confined.new_file(os.path.join(scene, path))
    with pytest.raises(errors.VhdkitError):
        confined.new_file(str(scene / "gone" / "n.avhd"))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_folders_that_others_can_change(scene: Path, mode: int) -> None:
    """INV-CONTROL-CONFINED: where somebody else could exchange a file after it was looked at, none is taken."""
    confined = confined_to([str(scene)])
    (scene / "below").chmod(mode)
    with pytest.raises(errors.AccessDenied, match="is writable by users other than"):
        confined.image(str(scene / "below" / "b.vhd"))
    with pytest.raises(errors.AccessDenied, match="is writable by users other than"):
        confined.new_file(str(scene / "below" / "n.avhd"))
    with pytest.raises(errors.AccessDenied):
        confined.beside(str(scene / "below" / "b.vhd"))
    confined.beside(str(scene / "a.vhd"))
    with pytest.raises(errors.AccessDenied):
        confined_to([str(scene / "below")])
    scene.chmod(mode)
    is_sticky = mode == 0o1777  # others make files there and rename none of ours
    (scene / "below").chmod(0o755)
    assert (unguarded(str(scene / "below")) is None) == is_sticky


def test_folders_of_others(scene: Path) -> None:
    """INV-CONTROL-CONFINED: a folder that belongs to somebody else is his to exchange, and so is all below it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(scene, 65534, -1)
    assert f"{scene} belongs to user 65534" in (unguarded(str(scene / "below")) or "")
    with pytest.raises(errors.AccessDenied, match="belongs to user 65534"):
        confined_to([str(scene / "below")])


def test_a_link_is_no_folder(scene: Path) -> None:
    """Real paths alone are judged: a link that came meanwhile is refused."""
    with pytest.raises(errors.VhdkitError):
        unguarded(str(scene / "out"))
    with pytest.raises(errors.NotFound):
        unguarded(str(scene / "gone"))
