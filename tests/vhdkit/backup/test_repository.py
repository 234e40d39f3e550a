# SPDX-License-Identifier: Apache-2.0
"""A repository as a folder: made, opened, listed and locked, however hostile its content is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vhdkit.backup.repositories import MACHINE, Nights, disk_record, manifest
from vhdkit import errors
from vhdkit.backup import repository as module
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.leases import leases
from vhdkit.backup.leftovers import remove_leftovers
from vhdkit.backup.repository import create_repository, open_repository

SECRET = "secret"


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """A repository with three nights of one disk; beside it lies a file that nothing may touch."""
    (tmp_path / "outside").write_text(SECRET)
    made = Nights(tmp_path / "repo")
    made.add({"disk-0": {0: b"one"}}, files={"definition.json": b"{}"})
    made.add({"disk-0": {4096: b"two"}})
    made.add({"disk-0": {}})
    return made


def test_a_repository_is_made_once(tmp_path: Path) -> None:
    """A new folder and an empty one become a repository; an existing one is opened with its id."""
    with create_repository(tmp_path / "a") as one:
        first = one.id
        assert os.stat(one.path).st_mode & 0o777 == 0o700
    with create_repository(tmp_path / "a") as again, open_repository(tmp_path / "a") as opened:
        assert again.id == opened.id == first
    (tmp_path / "b").mkdir()
    create_repository(tmp_path / "b").close()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "photo.jpg").touch()
    with pytest.raises(errors.InvalidArgument, match="neither a repository nor an empty folder"):
        create_repository(tmp_path / "c")
    with pytest.raises(errors.NotFound, match="not a backup repository"):
        open_repository(tmp_path / "c")


def test_two_processes_make_one_repository(tmp_path: Path) -> None:
    """Two processes that make the same repository at once agree on its id."""
    program = (
        "import sys\nfrom vhdkit.backup.repository import create_repository\n"
        "with create_repository(sys.argv[1]) as one:\n    print(one.id)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    ids = {one.communicate()[0] for one in running}
    assert len(ids) == 1 and not [one.name for one in (tmp_path / "a").iterdir() if one.name != "repository.json"]


def test_nights_are_listed_in_order(nights: Nights) -> None:
    """Nights come oldest first, with their manifests; the next number follows them."""
    with nights.machine() as machine:
        found = machine.nights()
        assert [one.number for one in found] == [1, 2, 3] and all(one.manifest for one in found)
        assert machine.next_number(found) == 4 and machine.name == "web"
    nights.check(1, 2, 3)


def test_a_machine_is_found_by_name_or_id(nights: Nights) -> None:
    """A machine is found by either; an unknown one is an error with the command that lists them, as are two."""
    with open_repository(nights.path) as repository:
        assert repository.machine_ids() == [MACHINE]
        assert repository.find_machine("web") == repository.find_machine(MACHINE) == MACHINE
        for word in ("mail", "../machines", "", "."):
            with pytest.raises(errors.NotFound, match="vhdkit backup list"):
                repository.find_machine(word)
        with repository.made_machine("other", "web"):
            pass
        with pytest.raises(errors.InvalidArgument, match="2 machines called 'web'"):
            repository.find_machine("web")


def test_a_number_is_used_once(nights: Nights) -> None:
    """The number of a removed night is never given to another one, also if it was the newest."""
    with nights.machine() as machine, machine.held("a test"):
        machine.remove_manifest(3)
        machine.remove_manifest(1)
    with nights.machine() as machine:
        assert [one.number for one in machine.nights()] == [2] and machine.next_number(machine.nights()) == 4


def test_a_night_is_written_once(nights: Nights) -> None:
    """A second night of one number is refused, and the first one stays."""
    with nights.machine() as machine, machine.held("a test"):
        before = machine.night(3)
        with pytest.raises(errors.AlreadyExists):
            machine.write_manifest(manifest(3, machine.repository.id))
        assert machine.night(3) == before and machine.night(4) is None


def test_one_process_writes(nights: Nights) -> None:
    """A second schedule or another host finds the machine locked and learns by whom; a killed one holds nothing."""
    program = (
        "import sys\nfrom vhdkit.backup.repository import open_repository\n"
        f"with open_repository(sys.argv[1]) as one, one.machine('{MACHINE}') as machine, machine.held('backup'):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(nights.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with nights.machine() as machine:
            with (
                pytest.raises(errors.ImageInUse, match=r"held by backup \(process \d+ on ") as caught,
                machine.held("prune"),
            ):
                raise AssertionError
            assert caught.value.exit_code == 5
            assert len(machine.nights()) == 3  # reading goes on
        other.kill()
        other.wait()
    with nights.machine() as machine, machine.held("prune"):
        pass


def test_leftovers_are_removed(nights: Nights, tmp_path: Path) -> None:
    """What a killed night left is removed: files under construction, images, sums and other files without a manifest.
    Everything that a night names, or that an older night may have made, stays."""
    with nights.machine() as machine, machine.held("a test"):
        images = Path(machine.path) / "images/disk-0"
        kept = {one.name for one in images.iterdir()}
        stray = {"00001.old", "notes.txt", "00002.avhd.bak"}
        for name in (*stray, "00004.avhd", "00004.avhd.sums", "00005.vhdx"):
            (images / name).write_bytes(b"x")
        dead = subprocess.run(
            [sys.executable, "-c", "from vhdkit.unfinished import part_name\nprint(part_name())"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        (images / dead).write_bytes(b"x")
        (Path(machine.path) / "meta/00004").mkdir()
        (Path(machine.path) / "meta/00004/nvram").write_bytes(b"x")
        removed = remove_leftovers(machine, machine.nights())
        assert {one.name for one in images.iterdir()} == kept | stray
        assert sorted(os.path.basename(one) for one in removed) == [
            "00004", "00004.avhd", "00004.avhd.sums", "00005.vhdx",
        ]  # fmt: skip
        assert sorted(os.listdir(Path(machine.path) / "meta")) == ["00001"]
    nights.check(1, 2, 3)


def test_a_deletion_without_a_journal_leaves_nothing(nights: Nights) -> None:
    """An image of any number that no manifest names is removed, as a deletion on a full disk can leave it; but not
    while a prune is under way, nor while a manifest cannot be read."""
    with nights.machine() as machine, machine.held("a test"):
        images, folder = Path(machine.path) / "images/disk-0", Path(machine.path) / "nights"
        journal, raw = Path(machine.path) / "prune.json", (folder / "00001.json").read_bytes()
        for name in ("00002.vhdx", "00002.vhdx.sums"):
            (images / name).write_bytes(b"left")
        journal.touch()
        assert remove_leftovers(machine, machine.nights()) == []
        journal.unlink()
        (folder / "00001.json").write_bytes(b"{}")
        assert remove_leftovers(machine, machine.nights()) == []
        (folder / "00001.json").write_bytes(raw)
        removed = remove_leftovers(machine, machine.nights())
        assert [os.path.basename(one) for one in removed] == ["00002.vhdx", "00002.vhdx.sums"]
    nights.check(1, 2, 3)


def test_a_fresh_file_system_is_an_empty_folder(tmp_path: Path) -> None:
    """A repository can be made in the root of a fresh ext4, in which there is `lost+found` and nothing else."""
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    create_repository(tmp_path / "disk").close()
    open_repository(tmp_path / "disk").close()
    (tmp_path / "other/lost+found").mkdir(parents=True)
    (tmp_path / "other/photo.jpg").touch()
    with pytest.raises(errors.InvalidArgument, match="neither a repository nor an empty folder"):
        create_repository(tmp_path / "other")


def test_a_damaged_manifest_protects_its_images(nights: Nights) -> None:
    """A manifest that cannot be read is still a night: what it names is no leftover."""
    with nights.machine() as machine, machine.held("a test"):
        path = Path(machine.path) / "nights/00003.json"
        image = Path(machine.path) / "images/disk-0/00003.avhd"
        image.write_bytes(b"precious")
        path.write_bytes(b"{" + path.read_bytes())
        found = machine.nights()
        assert found[2].manifest is None and isinstance(found[2].problem, DamagedRepository)
        assert remove_leftovers(machine, found) == [] and image.exists()
        assert machine.next_number(found) == 4


def test_a_night_is_read_under_a_lease(nights: Nights) -> None:
    """A reader has a lease while it reads; a night that does not exist is refused and leaves none."""
    with nights.machine() as machine:
        with machine.reading(2, "restore") as found:
            assert found.night == 2
            assert [one.night for one in leases(machine.repository.root)] == [2]
        with pytest.raises(errors.NotFound, match="has no night 9 of web"), machine.reading(9, "restore"):
            raise AssertionError
        assert leases(machine.repository.root) == []


def hostile(nights: Nights, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Parts of a repository that a stranger may replace, and by what."""
    machine = nights.path / "machines" / MACHINE
    outside = str(tmp_path)
    return {
        "repository.json": (nights.path / "repository.json", f"{outside}/outside"),
        "machines": (nights.path / "machines", outside),
        "machine": (machine, outside),
        "machine.json": (machine / "machine.json", f"{outside}/outside"),
        "nights": (machine / "nights", outside),
        "images": (machine / "images", outside),
        "disk": (machine / "images/disk-0", outside),
        "manifest": (machine / "nights/00002.json", f"{outside}/outside"),
        "lock": (machine / "lock", f"{outside}/outside"),
        "leases": (nights.path / "leases", outside),
    }


PARTS = (
    "repository.json", "machines", "machine", "machine.json", "nights", "images", "disk", "manifest", "lock", "leases",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe", "loop", "folder or file"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hostile_repository_reaches_nothing_outside(nights: Nights, tmp_path: Path, part: str, kind: str) -> None:
    """INV-FOLDER-HELD: links, pipes and loops in place of any part end in a typed error, quickly; nothing outside is
    read or changed."""
    path, target = hostile(nights, tmp_path)[part]
    if path.exists():
        path.rename(tmp_path / "aside")
    was_folder = (tmp_path / "aside").is_dir() or part == "leases"
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif was_folder:
        path.write_text(SECRET)
    else:
        path.mkdir()
    before = sorted(str(one) for one in tmp_path.rglob("*") if "repo" not in str(one))
    refused = False
    try:
        with open_repository(nights.path) as repository, repository.machine(MACHINE) as machine, machine.held("test"):
            found = machine.nights()
            refused = any(one.problem is not None and SECRET not in str(one.problem) for one in found)
            remove_leftovers(machine, found)
            for place in ("disk-0",):
                machine.images(place).close()
            leases(repository.root)
            with machine.reading(1, "restore"):
                pass
    except errors.VhdkitError as error:
        assert SECRET not in str(error)
        refused = True
    assert refused
    assert (tmp_path / "outside").read_text() == SECRET
    assert sorted(str(one) for one in tmp_path.rglob("*") if "repo" not in str(one)) == before


def test_random_damage_is_typed(nights: Nights) -> None:
    """Whatever bytes the documents of a repository have, listing ends in nights, problems or a typed error."""
    rng = random.Random(20)
    paths = [nights.path / "repository.json", *sorted((nights.path / "machines").rglob("*.json"))]
    for _ in range(150):
        path = rng.choice(paths)
        good = path.read_bytes()
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            if rng.random() < 0.3:
                del raw[at : at + rng.randint(1, 30)]
            else:
                raw[at] = rng.randrange(256)
            if not raw:
                break
        path.write_bytes(raw)
        try:
            with nights.machine() as machine:
                found = machine.nights()
                is_manifest = path.parent.name == "nights"
                assert not is_manifest or bytes(raw) == good or any(one.problem is not None for one in found)
        except (DamagedRepository, errors.UnsupportedFormat, errors.NotFound):
            pass
        path.write_bytes(good)
    with nights.machine() as machine:
        assert all(one.manifest for one in machine.nights())


def test_a_million_nights_are_refused_at_once(nights: Nights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More nights than any schedule makes are refused when the limit is reached: no manifest is read, and names past
    the limit are not looked at. As many as allowed are listed."""
    monkeypatch.setattr(module, "MAX_NIGHTS", 5)
    folder = nights.path / "machines" / MACHINE / "nights"
    for number in (4, 5):
        (folder / f"{number:05d}.json").touch()
    with nights.machine() as machine:
        assert len(machine.nights()) == 5
    for number in range(6, 3000):
        (folder / f"{number:05d}.json").touch()
    with nights.machine() as machine, pytest.raises(errors.InvalidArgument, match="more than 5 entries"):
        begin = time.monotonic()
        machine.nights()
    assert time.monotonic() - begin < 5
    assert module.MAX_NIGHTS == 5


def test_the_length_of_all_manifests_is_bounded(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests that are longer in all than any schedule's are refused: memory use is bounded."""
    sizes = [one.stat().st_size for one in (nights.path / "machines" / MACHINE / "nights").iterdir()]
    monkeypatch.setattr(module, "MAX_ALL_MANIFESTS_BYTES", sum(sizes))
    with nights.machine() as machine:
        assert len(machine.nights()) == 3
    monkeypatch.setattr(module, "MAX_ALL_MANIFESTS_BYTES", sum(sizes) - 1)
    with nights.machine() as machine, pytest.raises(errors.InvalidArgument, match="bytes in all"):
        machine.nights()


def test_a_manifest_of_another_machine_is_refused(nights: Nights) -> None:
    """A manifest that was copied from another machine, night or repository is no night here."""
    folder = nights.path / "machines" / MACHINE / "nights"
    (folder / "00004.json").write_bytes((folder / "00003.json").read_bytes())
    (folder / "00005.json").write_bytes(manifest(5, "cd" * 16, disks=(disk_record(),)).encoded())
    with nights.machine() as machine:
        found = machine.nights()
    assert [str(one.problem) for one in found[3:] if "is the manifest of another" in str(one.problem)] == [
        str(one.problem) for one in found[3:]
    ]


def test_documents_are_plain_json(nights: Nights) -> None:
    """Every document can be read by any program: JSON with a format and a digest."""
    for path in nights.path.rglob("*.json"):
        if path.parent.name.startswith("0"):
            continue
        document = json.loads(path.read_text())
        assert document["format"] == 1 and len(document["digest"]) == 64


def test_a_machine_that_a_kill_left_blank(nights: Nights) -> None:
    """A folder in which a killed first run has recorded nothing is no machine; one with nights is a damaged one."""
    blank = nights.path / "machines" / "cd" / "nights"
    blank.mkdir(parents=True)
    with open_repository(nights.path) as repository:
        assert repository.machine_ids() == [MACHINE]
        (blank / "00001.json").touch()
        assert repository.machine_ids() == [MACHINE, "cd"]


def test_what_dead_processes_left_outside_of_machines(nights: Nights) -> None:
    """What is under construction anywhere in a repository is removed once the process that makes it is dead."""
    program = "from vhdkit.unfinished import part_name\nprint(part_name())"
    part = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    for name in ("", "leases", "copies", "bases"):
        (nights.path / name).mkdir(exist_ok=True)
        (nights.path / name / part).touch()
    with nights.machine() as machine, machine.held("a test"):
        remove_leftovers(machine, machine.nights())
    assert not list(nights.path.rglob(part))
