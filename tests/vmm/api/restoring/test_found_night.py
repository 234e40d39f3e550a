# SPDX-License-Identifier: Apache-2.0
"""Which night is meant, and what its machine would have from outside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vmm.api.restoring.saved_nights import lease_count, save_night
from tests.vmm.snapshots.machines import Machines
from vmm.api.export_import.foreign import Consent
from vmm.api.restoring.found_night import CONSISTENCY, RestoreRequest, consent_of, found_night, plan_machine
from vmm.model.errors import InvalidSpec, NotFound, StoreFailed


def test_words_of_consent() -> None:
    """A word is a setting, a switch or a path; replacements count more than what is kept."""
    found = consent_of(["autostart", "switch:lan", "/a.iso", "/b.iso"], {"/b.iso": "/c.iso"}, {"wan": "-"})
    paths = {"/a.iso": "/a.iso", "/b.iso": "/c.iso"}
    assert found == Consent(paths, {"lan": "lan", "wan": "-"}, frozenset({"autostart"}), by_name=True)
    everything = consent_of(["all"], {}, {"wan": "-"})
    assert everything.path("/x") == "/x" and everything.switch("wan") == "-" and everything.allows("mirror")
    assert Consent().path("/x") is None and Consent().switch("lan") is None and not Consent().allows("mirror")


def test_every_consistency_has_words() -> None:
    """The words for people cover all that a manifest can say."""
    from vhdkit import backups

    assert set(CONSISTENCY) == set(backups.Consistency)


def test_the_wanted_night_is_leased(machines: Machines) -> None:
    """NAME, a number and a time mean a night, which has a lease as long as it is read; a dry run writes nothing."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    for hours in (0, 24):
        save_night("web", repository, hours=hours)
    for word, number in (("web", 2), ("web@1", 1), ("web@2026-11-30", 1), ("web@2026-12-01T03:00Z", 2)):
        with found_night(str(repository), word) as found:
            assert found.manifest.night == number and lease_count(repository) == 1
        assert lease_count(repository) == 0
        with found_night(str(repository), word, dry_run=True) as found:
            assert found.manifest.night == number and lease_count(repository) == 0
    for word, problem in (("web@3", "no night 3"), ("other", "no machine 'other'"), ("web@", "not a machine")):
        with pytest.raises(StoreFailed, match=problem), found_night(str(repository), word):
            pass
    nowhere = found_night(str(machines.folder / "none"), "web")
    with pytest.raises(StoreFailed, match="none"), nowhere:
        pass


def test_where_disks_go(machines: Machines, tmp_path: Path) -> None:
    """A folder in the definition needs consent, and one that the user names takes its place."""
    machines.create("web", 1, paths={"disks": str(tmp_path)})
    repository = str(machines.folder / "repo")
    save_night("web", machines.folder / "repo")
    with found_night(repository, "web", dry_run=True) as found:
        asked = plan_machine(found, RestoreRequest(repository, "web", "new"))
        assert dict(asked.refused) == {f"the folder for disks {tmp_path}": f"--allow {tmp_path}"}
        allowed = RestoreRequest(repository, "web", "new", consent=consent_of([str(tmp_path)], {}, {}))
        assert plan_machine(found, allowed).folder == str(tmp_path / "new")
        (tmp_path / "x").mkdir()
        elsewhere = plan_machine(found, RestoreRequest(repository, "web", "new", folder=str(tmp_path / "x")))
        assert elsewhere.folder == str(tmp_path / "x" / "new") and not elsewhere.refused
        assert elsewhere.spec.paths.disks is None
        with pytest.raises(InvalidSpec, match="cannot be the name"):
            plan_machine(found, RestoreRequest(repository, "web", "../x"))
        with pytest.raises(NotFound, match="does not exist"):
            plan_machine(found, RestoreRequest(repository, "web", "n", consent=consent_of(["/nowhere"], {}, {})))
