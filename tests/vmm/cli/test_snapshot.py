# SPDX-License-Identifier: Apache-2.0
"""`vmm snapshot ...`, `vmm export` and `vmm import`: their output, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.vmm.snapshots.machines import Machines
from vmm.cli.main import main


def vmm(*words: str, code: int = 0) -> str:
    """Run the command line; return its output on both streams."""
    result: Result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, (words, result.exit_code, result.output)
    assert "Traceback" not in result.output
    return result.output


def vmm_json(*words: str) -> Any:
    """Run the command; return the document that it printed."""
    return json.loads(vmm(*words, "--json"))


@pytest.fixture
def web(machines: Machines) -> Machines:
    """A machine "web" with a branch: a <- b, a <- now."""
    machines.create(disks=2)
    vmm("snapshot", "create", "web", "--name", "a", "--notes", "first\nof all")
    vmm("snapshot", "create", "web", "--name", "b")
    vmm("snapshot", "apply", "web", "a", "--discard-current")
    return machines


def test_tree_list_and_show(web: Machines) -> None:
    """The tree is drawn with the machine's present place; the same facts as a list, for one snapshot, and as JSON."""
    lines = [line.split("  ")[0].rstrip() for line in vmm("snapshot", "tree", "web").splitlines()]
    assert lines[0] == "SNAPSHOT" and lines[1] == "└─ ○ a"
    assert [line.strip() for line in vmm("snapshot", "tree", "web").splitlines()][2].startswith("├─ ○ b")
    assert [line.strip() for line in vmm("snapshot", "tree", "web").splitlines()][3].startswith("└─ ● now")
    assert "first" in vmm("snapshot", "tree", "web") and "of all" not in vmm("snapshot", "tree", "web")
    document = vmm_json("snapshot", "tree", "web")
    first, second = document["snapshots"]
    assert (first["name"], second["parent"], document["now"], document["limit"]) == ("a", first["id"], first["id"], 50)
    assert vmm_json("snapshot", "list", "web")[0]["notes"] == "first\nof all"
    assert vmm_json("snapshot", "show", "web", first["id"][:8])["allocated_disk_bytes"] > 0
    assert "now" in vmm("snapshot", "list", "web") and first["id"] in vmm("snapshot", "show", "web", "a")
    assert vmm("snapshot", "tree", "web", "--quiet") == vmm("snapshot", "list", "web", "-q") == ""


def test_delete_and_merge(web: Machines) -> None:
    """The output says what happened to the images, and when the rest will happen."""
    assert "removed" in vmm("snapshot", "delete", "web", "b")
    said = vmm("snapshot", "delete", "web", "a")
    assert "a is deleted" in said and "2 merges in the background" in said
    assert "2 merges waiting" in vmm("snapshot", "tree", "web")
    assert vmm("snapshot", "merge", "web") == "web: 2 merged\n"
    assert vmm("snapshot", "merge", "web") == "web: nothing to merge\n"
    assert vmm_json("snapshot", "merge", "web") == {"merged": 0, "merges": []}
    assert "nothing is being merged" in vmm("snapshot", "merge", "web", "--cancel")
    assert "no snapshots" in vmm("snapshot", "list", "web")


def test_deleting_a_subtree_needs_an_option(web: Machines) -> None:
    """More than one snapshot is deleted only on request."""
    assert "confirm with --yes" in vmm("snapshot", "delete", "web", "a", "--subtree", code=2)
    document = vmm_json("snapshot", "delete", "web", "a", "--subtree", "--yes")
    assert len(document["deleted"]) == 2 and len(document["removed"]) == 2


def test_applying_a_snapshot(web: Machines) -> None:
    """The present state is discarded only on request; if kept, it has the given name."""
    assert "would be lost" in vmm("snapshot", "apply", "web", "b", code=6)
    assert vmm("snapshot", "apply", "web", "b", "--snapshot-current", "--name", "kept") == "web is at b, and off\n"
    assert [one["name"] for one in vmm_json("snapshot", "list", "web")] == ["a", "b", "kept"]
    assert vmm_json("snapshot", "apply", "web", "a", "--discard-current")["state"] == "off"
    assert "--name needs" in vmm("snapshot", "apply", "web", "a", "--discard-current", "--name", "x", code=2)
    vmm("snapshot", "apply", "web", "a", "--discard-current", "--snapshot-current", code=6)


def test_names_and_limit(web: Machines) -> None:
    """Renaming, notes, and the limit."""
    assert vmm("snapshot", "rename", "web", "b", "better", "--notes", "n") == "web: better\n"
    assert vmm_json("snapshot", "rename", "web", "better", "--notes", "m")["notes"] == "m"
    assert "give a new name, --notes, or both" in vmm("snapshot", "rename", "web", "better", code=2)
    vmm("snapshot", "rename", "web", "better", "a", code=1)
    assert vmm("snapshot", "limit", "web", "1") == "web may have 1 snapshot\n"
    assert vmm("snapshot", "limit", "web", "2") == "web may have 2 snapshots\n"
    assert "its limit is 2" in vmm("snapshot", "create", "web", code=6)
    vmm("snapshot", "limit", "web", "0", code=2)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("snapshot", "create", "absent"), 1, "machine 'absent' does not exist"),
        (("snapshot", "show", "web", "zzz"), 1, "no snapshot 'zzz'"),
        (("snapshot", "create", "web", "--name", "a"), 1, "already"),
        (("snapshot", "create", "web", "--name", ""), 2, "cannot be the name"),
        (("snapshot", "create", "web", "--mode", "x"), 2, "--mode"),
        (("snapshot", "create", "web", "--consistent"), 5, "does not run"),
        (("snapshot", "merge", "web", "--live"), 5, "does not run"),
        (("snapshot", "merge", "web", "--max-rate", "1M"), 2, "--live"),
        (("snapshot", "merge", "web", "--live", "--max-rate", "0"), 2, "more than 0"),
        (("snapshot", "forget-memory", "web", "a"), 5, "no memory"),
        (("snapshot", "fly"), 2, "fly"),
        (("export", "web", "/nowhere/at/all"), 1, "/nowhere"),
        (("import", "/nowhere"), 1, "/nowhere: no such folder"),
        (("delete", "web", "--yes"), 5, "--with-snapshots"),
    ],
)
def test_wrong_arguments(web: Machines, words: tuple[str, ...], code: int, said: str) -> None:
    """One line with what is wrong and what to do, and an exit code for the cause."""
    before = web.images()
    output = vmm(*words, code=code)
    assert said in output and web.images() == before


def test_importing_a_strangers_machine(web: Machines) -> None:
    """Settings that reach outside the folder are listed with their options; those that were allowed are printed before
    the end."""
    out = web.folder / "out"
    vmm("export", "web", str(out))
    manifest = json.loads((out / "vmm-export.json").read_text())
    manifest["definition"] |= {"kernel": "/boot/a=b", "automatic": {"start": "always"}}
    (out / "vmm-export.json").write_text(json.dumps(manifest))
    said = vmm("import", str(out), "--name", "copy", code=6)
    assert "the kernel /boot/a=b [--map /boot/a=b=NEW]" in said and "[--allow autostart]" in said
    vmm("import", str(out), "--map", "x", code=2)
    vmm("import", str(out), "--allow", "everything", code=2)
    words = ("import", str(out), "--name", "copy", "--map", "/boot/a=b=", "--allow", "autostart")
    lines = vmm(*words).splitlines()
    assert lines[0] == "allowed: goes without the kernel /boot/a=b"
    assert lines[1].startswith("allowed: the machine starts") and lines[2].startswith("copy is imported")
    assert len(vmm_json(*words[:3], "again", *words[4:])["granted"]) == 2


def test_export_and_import(web: Machines) -> None:
    """A machine is exported and imported, and the output says what was made."""
    out = web.folder / "out"
    said = vmm("export", "web", str(out))
    assert str(out) in said and "2 snapshots" in said
    assert vmm_json("import", str(out), "--name", "copy")["name"] == "copy"
    assert [one["name"] for one in vmm_json("snapshot", "list", "copy")] == ["a", "b"]
    vmm("import", str(out), "--name", "copy", code=1)
    assert "2 images" in vmm("snapshot", "export", "web", "b", str(web.folder / "b"), "--flat")
    assert "is imported: 2 images" in vmm("import", str(web.folder / "b"), "--name", "flat")


def test_delete_with_snapshots(web: Machines) -> None:
    """What will be removed is listed first, and nothing is left behind."""
    said = vmm("delete", "web", "--with-snapshots", "--with-disks", "--dry-run")
    assert said.count("would remove") == 7
    vmm("delete", "web", "--with-snapshots", "--with-disks", "--yes")
    assert web.images() == set() and not list(Path(web.folder / "home" / "snapshots").iterdir())
