# SPDX-License-Identifier: Apache-2.0
"""What is prepared for QEMU before it starts."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator

import pytest

from vmm.kvm import program
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.spec import make_spec
from vmm.worker import launch


@pytest.fixture
def folder() -> Iterator[str]:
    """A short path, in which sockets can be made, that every user may pass through."""
    with tempfile.TemporaryDirectory(prefix="vmm-launch-") as path:
        yield path


def test_the_folder_for_device_nodes_is_private(folder: str, monkeypatch: pytest.MonkeyPatch, umask: None) -> None:
    """The folder over which device nodes are mounted is 0700, whatever the umask is and an earlier start left."""
    monkeypatch.setattr(program, "find", lambda: "qemu")
    monkeypatch.setattr(launch, "privileged_command", lambda command, **rest: command)
    for _ in range(2):
        _, prepared = launch.prepare(
            make_spec(name="web"), MachinePaths(folder), RuntimePaths(folder),
            accelerator="tcg", incoming=False, identity=None,
        )  # fmt: skip
        prepared.close()
        scratch = os.path.join(folder, "dev")
        assert stat.S_IMODE(os.stat(scratch).st_mode) == 0o700
        os.chmod(scratch, 0o711)
