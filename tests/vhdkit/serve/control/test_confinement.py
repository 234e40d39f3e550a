# SPDX-License-Identifier: Apache-2.0
"""Which paths of a control owner are accepted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vhdkit import errors
from vhdkit.guarded import unguarded
from vhdkit.serve.control.confinement import confined_to


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder to be confined to, with an image and a subfolder, and links that lead out of it."""
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
    """INV-CONTROL-CONFINED: any spelling that ends in the folder is accepted, also if a link names the folder."""
    confined = confined_to([str(scene.parent / "alias")])
    for path in ("a.vhd", "below/../a.vhd", "./a.vhd", "below/b.vhd", "in.vhd"):
        for room in (scene, scene.parent / "alias"):
            real = confined.image(os.path.join(room, path))
            assert real == os.path.realpath(os.path.join(scene, path))


@pytest.mark.parametrize("path", ["out.vhd", "out/c.vhd", "../other/c.vhd", "../../etc/passwd", "..", ""])
def test_images_outside(scene: Path, path: str) -> None:
    """INV-CONTROL-CONFINED: a path that leads out is refused, whether the file exists or not."""
    confined = confined_to([str(scene)])
    with pytest.raises((errors.AccessDenied, errors.InvalidArgument)):
        confined.image(os.path.join(scene, path))
    with pytest.raises(errors.AccessDenied):
        confined_to([]).image(str(scene / "a.vhd"))


def test_paths_that_are_not_images(scene: Path) -> None:
    """A relative path, an empty one, a folder, a pipe (which is not opened): typed errors."""
    confined = confined_to([str(scene)])
    for path in ("a.vhd", str(scene / "pipe"), str(scene / "below"), "/a\0b"):
        with pytest.raises(errors.InvalidArgument):
            confined.image(path)
    for path in ("gone.vhd", "dangling", "a.vhd/x"):
        with pytest.raises(errors.NotFound):
            confined.image(str(scene / path))


def test_new_files(scene: Path) -> None:
    """INV-CONTROL-CONFINED: a new file must be in a folder inside, after links are followed."""
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
    """INV-CONTROL-CONFINED: no file is accepted where another user could exchange it after the check."""
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
    is_sticky = mode == 0o1777  # other users can make files there, but not rename ours
    (scene / "below").chmod(0o755)
    assert (unguarded(str(scene / "below")) is None) == is_sticky


def test_folders_of_others(scene: Path) -> None:
    """INV-CONTROL-CONFINED: the owner of a folder can exchange it, and everything below it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(scene, 65534, -1)
    assert f"{scene} belongs to user 65534" in (unguarded(str(scene / "below")) or "")
    with pytest.raises(errors.AccessDenied, match="belongs to user 65534"):
        confined_to([str(scene / "below")])


def test_a_link_is_not_a_folder(scene: Path) -> None:
    """Only real paths are judged: a link created meanwhile is refused."""
    with pytest.raises(errors.VhdkitError):
        unguarded(str(scene / "out"))
    with pytest.raises(errors.NotFound):
        unguarded(str(scene / "gone"))
