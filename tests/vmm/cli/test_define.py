# SPDX-License-Identifier: Apache-2.0
"""`create`, `set` and `delete` with good and bad arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.cli.running import document, failure, good, run
from vmm.api.manager import Manager

MIB = 1 << 20


@pytest.fixture
def folder(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, which is the working directory."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("a.vhd", "b.vhd"):
        vhdkit.create_image(place / name, 8 * MIB)
    vhdkit.create_child(place / "a.avhd", place / "a.vhd")
    (place / "cd.iso").write_bytes(bytes(4096))
    (place / "kernel").write_bytes(b"kernel")
    return place


def test_create_with_everything(folder: Path) -> None:
    """All options become settings; relative names become absolute; type and model are versioned."""
    words = [
        "--memory", "1G", "--cpus", "2", "--firmware", "uefi", "--boot-order", "disk,cdrom", "--accel", "tcg",
        "--disk", "a.avhd", "--disk", "b.vhd,controller=scsi,unit=5,serial=DATA,read-only", "--cdrom", "cd.iso",
        "--no-screen", "--service", "time-sync=off", "--automatic-start", "always", "--start-delay", "5",
        "--automatic-stop", "shut-down", "--automatic-recovery", "restart", "--notes", "mine", "--rtc", "local",
    ]  # fmt: skip
    made = document("create", "web", *words)
    definition = made["definition"]
    assert (made["name"], made["state"]) == ("web", "off")
    assert (definition["memory_bytes"], definition["cpu_count"], definition["firmware"]) == (1 << 30, 2, "uefi")
    assert [(disk["path"], disk["controller"], disk["unit"], disk["format"]) for disk in definition["disks"]] == [
        (str(folder / "a.avhd"), "ide", 0, "vhd"),
        (str(folder / "b.vhd"), "scsi", 5, "vhd"),
        (str(folder / "cd.iso"), "ide", 1, None),
    ]
    assert definition["disks"][1]["serial"] == "DATA" and definition["disks"][1]["read_only"]
    assert definition["machine_type"].startswith("pc-i440fx-") and definition["integration"]["time_sync"] is False
    assert definition["automatic"] == {
        "start": "always", "start_delay_seconds": 5, "stop": "shut-down", "recovery": "restart",
    }  # fmt: skip
    assert definition["rtc"] == "local" and "local time" in good("show", "web")
    assert "Nehalem-v1" in good("show", "web") and "a.avhd" in good("show", "web")
    assert "web   off" in good("list")
    assert json.loads(good("list", "--json"))[0]["definition"] == definition


def test_a_vhdx_is_never_taken_for_a_raw_disk(folder: Path) -> None:
    """A VHDX image is one under any name; its sector sizes are recorded."""
    vhdkit.create_image(folder / "c.vhdx", 8 * MIB, disk_format="vhdx")
    (folder / "c.img").symlink_to("c.vhdx")
    for name in ("c.vhdx", "c.img", "c.vhdx,format=vhdx"):
        [disk] = document("create", "web", "--disk", name)["definition"]["disks"]
        assert (disk["format"], disk["sector_bytes"], disk["physical_sector_bytes"]) == ("vhdx", 512, 4096)
        assert "ide0:0  vhdx" in good("disk", "list", "web") and "vhdx" in good("show", "web")
        good("delete", "web", "--yes")
    failure("create", "web", "--disk", "c.vhdx,format=vhd", code=3)


def test_disks_in_any_order(folder: Path) -> None:
    """What a machine boots from may be named after disks that it cannot boot from."""
    vhdkit.create_image(folder / "large.vhdx", 8 * MIB, disk_format="vhdx", sector_bytes=4096)
    failure("create", "web", "--disk", "large.vhdx", code=2)
    for words in (["--disk", "large.vhdx"], ["--disk", "b.vhd,controller=scsi"]):
        made = document("create", "web", *words, "--disk", "a.avhd")
        assert [disk["id"] for disk in made["definition"]["disks"]] == ["disk-0", "disk-1"]
        good("delete", "web", "--yes")
        document("create", "web", *words, "--cdrom", "")
        good("delete", "web", "--yes")
    assert "ide0:0 is used twice" in failure("create", "web", "--disk", "a.avhd,index=0,unit=0", "--disk",
                                             "b.vhd,index=0,unit=0", code=2)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["a/b"], 2, "cannot be the name of a machine"),
        ([".."], 2, "cannot be the name of a machine"),
        (["x", "--memory", "lots"], 2, "not a size"),
        (["x", "--memory", "1K"], 2, "memory_bytes"),
        (["x", "--cpus", "0"], 2, "cpu_count"),
        (["x", "--disk", "absent.vhd"], 1, "the image does not exist"),
        (["x", "--disk", ""], 2, "names no image"),
        (["x", "--disk", "cd.iso,controller=floppy"], 2, "not a controller"),
        (["x", "--disk", "a.avhd,unit=x"], 2, "not a number"),
        (["x", "--disk", "a.avhd,unit=2"], 2, "ide0:2 does not exist"),
        (["x", "--disk", "a.avhd,serial="], 2, "not an option"),
        (["x", "--disk", "a.avhd,controller=scsi"], 2, "cannot boot from SCSI"),
        (["x", "--disk", "a.avhd", "--disk", "./a.avhd"], 5, "twice"),
        (["x", "--disk", "kernel"], 2, "is too small for a disk: it has"),
        (["x", "--cdrom", "absent.iso"], 1, "could not open"),
        (["x", "--cdrom", "."], 2, "neither a file"),
        (["x", "--kernel", "absent"], 1, "could not open"),
        (["x", "--initrd", "kernel"], 2, "require a kernel"),
        (["x", "--boot-order", "floppy"], 2, "the devices are disk"),
        (["x", "--service", "coffee=on"], 2, "heartbeat"),
        (["x", "--service", "heartbeat=maybe"], 2, "NAME=on|off"),
        (["x", "--service", "tea=on"], 2, "time-sync, key-value, backup"),
        (["x", "--folder", "absent"], 2, "not a folder"),
        (["x", "--cpu", "a b"], 2, "cpu_model"),
        ([], 2, "NAME"),
        (["x", "--wings"], 2, "--wings"),
    ],
)
def test_bad_arguments(folder: Path, words: list[str], code: int, said: str) -> None:
    """An impossible setting is one line with the reason, and no machine is made."""
    assert said in failure("create", *words, code=code)
    assert document("list") == []


def test_an_image_of_another_machine(folder: Path) -> None:
    """Another machine's image is refused, with what to do instead; a taken name, too."""
    good("create", "web", "--disk", "a.avhd")
    assert "vhdkit create NEW.avhd --parent" in failure("create", "db", "--disk", "a.avhd", code=5)
    assert "of that name" in failure("create", "web", "--disk", "b.vhd", code=1)


def test_an_image_in_the_disk_folder(folder: Path, tmp_path: Path) -> None:
    """A bare name that does not exist here is looked for in the machine's folder for disks."""
    (tmp_path / "store").mkdir()
    vhdkit.create_image(tmp_path / "store" / "c.vhd", 8 * MIB)
    made = document("create", "web", "--disk", "c.vhd", "--disk-folder", str(tmp_path / "store"))
    assert made["definition"]["disks"][0]["path"] == str(tmp_path / "store" / "c.vhd")


def test_changing_settings(folder: Path) -> None:
    """Only what was named changes, at once for a machine that is off; a call without settings is an error."""
    good("create", "web", "--disk", "a.avhd", "--service", "backup=off")
    assert good("set", "web", "--memory", "64M", "--service", "heartbeat=off", "--rename", "www") == "www is changed\n"
    definition = document("show", "www")["definition"]
    assert definition["memory_bytes"] == 64 * MIB and definition["name"] == "www"
    assert [name for name, is_on in definition["integration"].items() if not is_on] == ["heartbeat", "backup"]
    assert "name a setting to change" in failure("set", "www", code=2)
    assert "does not exist" in failure("set", "web", "--cpus", "2", code=1)
    assert "cpu_count" in failure("set", "www", "--cpus", "1000", code=2)
    good("create", "db", "--disk", "b.vhd")
    assert "already" in failure("set", "www", "--rename", "db", code=1)


def test_delete_lists_what_is_removed(folder: Path) -> None:
    """Disks stay unless requested; parents always stay; without a terminal nothing is removed unless --yes is
    given."""
    good("create", "web", "--disk", "a.avhd", "--disk", "b.vhd,read-only", "--cdrom", "cd.iso")
    assert "confirm with --yes" in failure("delete", "web", "--quiet", code=2)
    listed = good("delete", "web", "--with-disks", "--dry-run")
    assert f"would remove  {folder}/a.avhd" in listed and f"keeps    {folder}/b.vhd" in listed
    assert document("list") != []
    plan = document("delete", "web", "--with-disks", "--yes")
    assert plan["deleted"] and plan["disks"] == [str(folder / "a.avhd")]
    assert sorted(path.name for path in folder.iterdir()) == ["a.vhd", "b.vhd", "cd.iso", "kernel"]
    assert document("list") == []
    good("create", "web", "--disk", "a.vhd")
    good("delete", "web", "--yes")
    assert (folder / "a.vhd").exists()
    assert "does not exist" in failure("delete", "web", "--yes", code=1)


def test_a_disk_with_children_stays(folder: Path) -> None:
    """An image with a child is never removed, whatever was requested; a machine that would write to it is not made."""
    assert "a.avhd stands on it" in failure("create", "web", "--disk", "a.vhd", code=6)
    away = folder.parent / "elsewhere" / "away"
    away.parent.mkdir()
    (folder / "a.avhd").rename(away)
    good("create", "web", "--disk", "a.vhd")
    away.rename(folder / "a.avhd")
    plan = document("delete", "web", "--with-disks", "--yes")
    assert plan["disks"] == [] and (folder / "a.vhd").exists()


def test_a_damaged_definition(folder: Path, manager: Manager) -> None:
    """A machine that cannot be read is listed with what is wrong with it."""
    good("create", "web", "--disk", "a.avhd")
    Path(manager.show("web").folder or "").joinpath("machine.json").write_text('{"name": 5}')
    assert "unknown" in good("list") and "not a machine definition" in good("list")
    assert "not a machine definition" in failure("show", "web", code=2)
    assert "not a machine definition" in failure("start", "web", code=2)


def test_help_of_every_verb(manager: Manager) -> None:
    """Each verb explains what it does, with examples."""
    from vmm.cli.main import _VERBS

    for verb in _VERBS:
        result = run(verb, "--help")
        assert result.exit_code == 0 and "Usage" in result.output, verb
