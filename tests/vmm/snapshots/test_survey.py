# SPDX-License-Identifier: Apache-2.0
"""Who else needs a machine's images: a copied folder of it, too."""

from __future__ import annotations

import os

import pytest

from tests.vmm.snapshots.machines import Machines
from tests.vmm.test_copies import copied
from vmm import registry
from vmm.errors import WrongState
from vmm.manager import Manager
from vmm.snapshots.store import load_tree


def test_images_of_a_copy_hold_back_the_deletion_of_snapshots(machines: Machines) -> None:
    """What the copy still names is neither removed nor merged by the original."""
    web = machines.create()
    web.create("one")
    copied()
    frozen = str(registry.load("copy").spec.disks[0].path)
    web.create("two")
    web.apply("one", discard_current=True)
    web.delete("two")
    assert os.path.exists(frozen) and frozen in load_tree(registry.load("web").paths).images
    with pytest.raises(WrongState, match="only machine of its id"):
        Manager().new_id("web")
    Manager().new_id("copy")
    web.merge()
    assert not os.path.exists(frozen)
