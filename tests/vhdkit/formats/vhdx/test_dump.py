# SPDX-License-Identifier: Apache-2.0
"""The structures of damaged VHDX files, as far as they can be read."""

from __future__ import annotations

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.damaged import T1, T2, base, patched
from tests.vhdkit.formats.vhdx.images import BAT, LOG, add_log, page
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.log import LogChange


def states(store: MemStore) -> dict[str, str]:
    """The state of each structure."""
    return {one.structure: one.state for one in VHDX.dump(store)}


def test_tables_with_wrong_checksums_are_shown() -> None:
    """Entries show the state of their table, and the metadata are found by them; an intact table is preferred."""
    store = base()
    patched(T1 + 4, T2 + 4, raw=b"1234")(store)
    found = states(store)
    assert found["region table 1, entry 1 (BAT region)"] == "checksum wrong" == found["region table 2"]
    assert found["metadata table"] == "good" and "virtual disk size" in found
    store = base()
    store.pwrite(T1 + 48 + 16, (1 << 40).to_bytes(8, "little"))
    assert states(store)["metadata table"] == "good"


def test_entries_of_a_log_that_cannot_be_replayed_are_shown() -> None:
    """Intact entries are shown although the tail of the newest one is lost."""
    store = base()
    add_log(store, [[], [LogChange(BAT, 4096, page(b"\0"))]])
    store.pwrite(LOG, bytes(4096))
    found = states(store)
    assert "no complete sequence" in found["log"] and found["log entry 2"] == "intact"
