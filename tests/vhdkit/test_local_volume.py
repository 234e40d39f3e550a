# SPDX-License-Identifier: Apache-2.0
"""The local file system as a volume, compared with a volume in memory."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.harness.memory_volume import MemoryVolume
from vhdkit import errors
from vhdkit.local_volume import LOCAL
from vhdkit.volume import Volume


def test_both_volumes_answer_alike(tmp_path: Path) -> None:
    """Following names, real places and listings give the same in memory as in a file system."""
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    for place in ("a/x.vhd", "a/Y.vhd", "a/b/z.vhd", "c/x.vhd", ".hidden", "a/.vhdkit-1.part"):
        volume.add(f"{root}/{place}").pwrite(0, place.encode())
    for place, text in {"a/up": "../c", "a/self": "b", "a/loop": "loop", "l": f"{root}/a/x.vhd", "a/out": "/"}.items():
        volume.links[f"{root}/{place}"] = text.removeprefix(root) if text.startswith(root) else text
    volume.links[f"{root}/l"] = "a/x.vhd"
    volume.links.pop(f"{root}/a/out")
    volume.write_to(Path("/"))
    names = "a a/x.vhd a/X.VHD a/y.vhd a/b/z.vhd a/self/z.vhd a/self/../x.vhd a/up/x.vhd a/loop l c/x.vhd no a/b/no/x"
    tries = itertools.product(names.split(), ([root], [f"{root}/a"], [f"{root}/a", f"{root}/c"], [f"{root}/no"], []))

    def followed(volume: Volume, name: str, folders: list[str]) -> object:
        place = volume.follow(f"{root}/{name}", folders)
        content = None
        if place.store is not None:
            with place.store as store:
                content = store.pread(0, 100)
        return place.outcome, place.path, content

    for name, folders in tries:
        assert followed(volume, name, folders) == followed(LOCAL, name, folders), (name, folders)
    for name in names.split():
        place = f"{root}/{name}"
        if "loop" not in name:
            assert volume.real(place) == LOCAL.real(place)
        assert volume.exists(place) == LOCAL.exists(place)
        assert list(volume.siblings(place)) == list(LOCAL.siblings(place))


def test_listed_file_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    """A regular file of a listing that is a link by the time it is opened is not opened, on either volume."""
    volume, root = MemoryVolume(), os.path.realpath(tmp_path)
    volume.add(f"{root}/secret").pwrite(0, b"secret")
    volume.links[f"{root}/link"] = "secret"
    volume.write_to(Path("/"))
    for one in (volume, LOCAL):
        with pytest.raises(errors.InvalidArgument):
            one.open_regular(f"{root}/link", follow_links=False)
        with one.open_regular(f"{root}/link") as store:
            assert store.pread(0, 6) == b"secret"
