# SPDX-License-Identifier: Apache-2.0
"""The error lines of both programs are written for users: nothing twice, and hints that can be followed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

import vhdkit
from tests.support import python_files, require_tool
from tests.test_doc_words import ROOTS, complaint, options_of, verbs
from tests.vhdkit.cli.running import run as run_vhdkit
from tests.vmm.cli.running import run as run_vmm
from tests.vmm.small_guests import make_machine
from tests.vmm.stage import machine_stage
from vmm.api.manager import Manager

MIB = 1 << 20
LONG = "n" * 300
VERBS = {
    name: "|".join(root.list_commands(click.Context(root)))
    for name, root in ROOTS.items()
    if isinstance(root, click.Group)
}
COMMAND = re.compile("|".join(rf"\b{name} (?:{words})\b[^;,()`\n]*" for name, words in VERBS.items()))
NAME = re.compile(r"[^\s(']*(?:/|\.a?vhd)[^\s')]*")
OTHER_PROGRAMS = re.compile(r"\bfirewall-cmd\b[^;&`\n]*")  # may have options of the same names
OPTIONS = {name: set().union(*(options_of(one) for _, one in verbs(root, name))) for name, root in ROOTS.items()}
PROGRAMMERS_WORDS = (
    "Errno", "Traceback", "NoneType", "validation error", "Value error", "Error:", "Error(", "integer range", "float",
    "internal error", "Usage:", "\\n", "<class", "pydantic", "libiscsi", "object has no", "str", "int",
)  # fmt: skip

# One command a line; LONG stands for a name of 300 characters, LOCKED for a file that may not be opened.
VHDKIT = """
info nothing.vhd
info no/such/disk.vhd
info dir
info empty.vhd
info text.vhd
info disk.qcow2
info disk.raw.gz
info headless.vhd
info cookie.vhd
info pipe
info loop.vhd
info base.vhd/x
info
info base.vhd base.vhd
info --formt raw base.vhd
info --format vdi base.vhd
info --format vhd plain.raw
info LONG
info locked.vhd
chain orphan.avhd
chain wrong.avhd
check nothing.vhd
check base.vhd --dry-run
check base.vhd --repair --restore note.undo
check base.vhd --restore note.undo
check base.vhd --restore nothing.undo
check plain.raw --repair
check busy.vhd --repair
map orphan.avhd
map leaf.avhd --svg no/such/map.svg
map leaf.avhd --svg base.vhd
map leaf.avhd --svg dir
convert base.vhd new
convert base.vhd base.vhd --to fixed --force
convert base.vhd alone.vhd --to fixed
convert base.vhd no/such/new.vhd --to fixed
convert base.vhd new.vhd --to vmdk
convert base.vhd new.vhd --to dynamic --block-size 3M
convert base.vhd new.vhd --to fixed --block-size 2M
convert base.vhd - --to dynamic
convert leaf.avhd mid.avhd --to dynamic --force
convert plain.raw new.vhd --to dynamic --format vhd
compare base.vhd dir
compare base.vhd
create new.vhd
create new.vhd --size
create new.vhd --size 0
create new.vhd --size lots
create new.vhd --size 3T
create new.vhd --size 10G --block-size 5
create new.vhd --size 10G --format dynamic --azure
create new.vhd --size 10G --preallocate
create new.qcow2 --size 10G
create new.vhd --parent nothing.vhd
create new.vhd --parent base.vhd --format fixed
create new.vhd --parent base.vhd --size 1M
create base.vhd --size 10G
create base.vhd --size 10G --force
create base.vhd --parent base.vhd --force
create dir --size 10G
create pipe --size 10G --force
create LONG --size 10G
create new.vhd --parent orphan.avhd
create locked/new.vhd --size 1M
snapshot base.vhd
snapshot alone.vhd base.vhd
snapshot alone.vhd a b
snapshot --many alone.vhd alone.vhd
snapshot busy.vhd
clone base.vhd
clone base.vhd leaf.avhd
clone base.vhd no/such/a.avhd
merge base.vhd
merge leaf.avhd --into alone.vhd
merge leaf.avhd --into leaf.avhd
merge mid.avhd
merge leaf.avhd --resume
merge leaf.avhd --resume --into base.vhd
merge leaf.avhd --to base.vhd
merge leaf.avhd --to new.vhd --relink
merge orphan.avhd
pull base.vhd
pull leaf.avhd --to alone.vhd
pull leaf.avhd --to leaf.avhd
pull mid.avhd --to leaf.avhd
pull leaf.avhd --relink
pull leaf.avhd --independent --to base.vhd
pull orphan.avhd --independent
rebase leaf.avhd
rebase alone.vhd --parent base.vhd
rebase leaf.avhd --parent alone.vhd
rebase leaf.avhd --parent leaf.avhd
rebase mid.avhd --parent leaf.avhd
rebase leaf.avhd --parent alone.vhd --unsafe-new-id
rebase leaf.avhd --parent alone.vhd --accept-parent-id 17
rebase orphan.avhd --parent alone.vhd --unsafe-new-id
rebase orphan.avhd --parent alone.vhd
relocate leaf.avhd nowhere
relocate leaf.avhd base.vhd
relocate mid.avhd dir
relocate orphan.avhd dir
compact nothing.vhd
compact busy.vhd
compact headless.vhd
resize alone.vhd lots
resize alone.vhd 1M
resize alone.vhd 1M --shrink
resize alone.vhd 5T
resize base.vhd 20M
resize leaf.avhd 4M --shrink
resize copy.vhd 20M
gc nowhere --keep base.vhd
gc base.vhd --keep leaf.avhd
gc . --keep nothing.vhd
serve
serve nothing.vhd
serve base.vhd
serve alone.vhd alone.vhd
serve alone.vhd --socket no/such/s
serve alone.vhd --socket LONG
serve alone.vhd --socket base.vhd
serve alone.vhd --listen 0.0.0.0:99999
serve alone.vhd --listen 0.0.0.0:0
serve alone.vhd --read-only --overlay
serve alone.vhd --keep-overlay x
serve alone.vhd --tls-certs dir
serve alone.vhd --tls-required
serve alone.vhd --tls-psk nowhere
serve alone.vhd --control-owner root
serve alone.vhd --socket s --socket-owner nobody-at-all
serve alone.vhd --remember base.vhd
serve --exports broken.json
serve --exports unknown.json
serve --exports nothing.json
serve --export x alone.vhd
serve alone.vhd --pid-file base.vhd
serve alone.vhd --engine steam
ctl nowhere status
ctl base.vhd status
ctl nowhere disconnect
ctl nowhere add x
ctl nowhere fly
ctl nowhere resize x y
ctl nowhere
mount alone.vhd nowhere
mount alone.vhd base.vhd
mount alone.vhd full
mount alone.vhd dir --rw --overlay
mount alone.vhd dir --keep-overlay x
mount alone.vhd dir --partition 3
mount alone.vhd dir --partition 3 --fs
mount alone.vhd dir --partition x --fs
mount alone.vhd dir --partition 0 --fs
mount alone.vhd dir --fs
mount alone.vhd dir --file
mount alone.vhd dir -o fly
umount nowhere
umount /proc
mounts x
dump nothing.vhd
dump plain.raw
fly
--fly
"""
VMM = """
fly
start
start absent
start ../etc
start LONG
stop web
shutdown web
shutdown web --timeout x
shutdown web --timeout 0
pause web
reset web
save web
create web
create a/b
create new --disk nothing.vhd
create new --disk dir
create new --disk empty
create new --disk orphan.avhd
create new --disk outside.avhd
create new --disk a.vhd
create new --disk text.vhd
create new --disk disk.qcow2
create new --disk locked.vhd
create new --disk b.vhd,fly=1
create new --disk b.vhd,controller=usb
create new --disk b.vhd,index=x
create new --disk b.vhd,index=7
create new --disk b.vhd,controller=scsi
create new --disk b.vhd,format=qcow2
create new --disk b.vhd --disk b.vhd
create new --disk
create new --disk ,controller=ide
create new --memory 0
create new --memory lots
create new --memory 3000T
create new --cpus 0
create new --cpus x
create new --firmware openboot
create new --boot-order disk,floppy
create new --boot-order disk,disk
create new --kernel nothing
create new --kernel dir
create new --initrd cd.iso
create new --cdrom nothing.iso
create new --cdrom empty
create new --cdrom cd.iso,controller=scsi
create new --pass-through /dev/nothing
create new --pass-through a.vhd
create new --pass-through /dev/null
create new --pass-through iscsi://host
create new --pass-through iscsi://host/target/x
create new --folder nowhere
create new --service fly=on
create new --service heartbeat=maybe
create new --automatic-start soon
create new --start-delay -1
set web
set absent --memory 1G
set web --rename box
set web --rename a/b
set web --new-id
set web --disks-folder nowhere
delete web --yes
list x
show
logs web --of nothing
logs web --follow
logs web --lines -1
disk add web nothing.vhd
disk add web
disk add web b.vhd --cdrom --pass-through
disk add web a.vhd
disk add web b.vhd,controller=scsi,unit=999
disk remove web disk-9
disk change web disk-0 cd.iso
disk change web disk-1
disk change web disk-1 nothing.iso
disk change web disk-9 cd.iso
disk resize web disk-0 1M
disk resize web disk-0 lots
disk resize web disk-1 10G
nic add web nowhere
nic add web lab,vlan=x
nic add web lab,vlan=5000
nic add web lab,mac=xx
nic add web lab,mac=ff:ff:ff:ff:ff:ff
nic add web lab,type=usb
nic add web lab,bandwidth=fast
nic add web lab,vlan=5,trunk=1+2
nic remove web nic-9
nic set web nic-0
nic set web nic-0 link=side
nic set web nic-0 fly=1
switch create lab --type private
switch create x/y --type private
switch create new --type external
switch create new --type private --nic eth0
switch create new --type internal --address 10.0.0.0/24
switch create new --type internal --address 10.0.0.300/24
switch create new --type private --nat
switch create new --type internal --dhcp-range x
switch show absent
switch capture lab -o no/such/x
switch capture lab --port x -o y
switch lease lab web/nic-0 10.0.0.1
switch delete absent
switch delete lab
snapshot create web --name clean
snapshot create web --name ''
snapshot create web --mode fast
snapshot create web --consistent
snapshot show web nothing
snapshot show box nothing
snapshot apply web clean
snapshot apply web nothing --discard-current
snapshot apply web clean --discard-current --name x
snapshot rename web clean
snapshot limit web 0
snapshot limit web x
snapshot forget-memory web clean
snapshot merge web --max-rate 5M
snapshot merge web --live
snapshot export web clean dir
snapshot export web nothing new
export web dir
export web no/such/folder
export web new --snapshot nothing
import dir
import nowhere
import a.vhd
import dir --map x
repair web --leaf nothing
backup web dir
backup web no/such/new
console web --watch --take
console web --timeout 0
screen web
agent ping web
kvp get web nothing
kvp set web '' x
kvp delete web nothing
host paths set disks nowhere
host paths set fly dir
host paths set disks
host fly
"""
RUNNING = """
start small
resume small
create other --disk small.avhd
set small --rename other
set small --new-id
delete small --yes
export small new
repair small
disk resize small disk-0 1M --shrink
disk resize small disk-0 16M
disk remove small disk-0
disk add small extra.vhd
disk change small disk-0 --eject
nic remove small nic-0
snapshot merge small
agent ping small
agent freeze small --seconds 99999999
snapshot create small --consistent
"""


def faults(program: str, printed: str) -> list[str]:
    """What is wrong with the error output of a failed command of `program`."""
    if printed.count("\n") != 1 or not printed.startswith(f"{program}: "):
        return ["is not one line of the program"]
    line = printed.strip().removeprefix(f"{program}: ")
    found = [f"says {word!r}" for word in PROGRAMMERS_WORDS if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line)]
    if re.search(
        r"[;:,?!][;:,.?!]|(?<!\.)\.\.(?!\.)|\.\.\.\.| [;:,?!]|[;:,]$", re.sub(r"'[^']*'", "0", NAME.sub("0", line))
    ):
        found.append("has a doubled or lost sign")
    if re.match(r"(is|has|does|was|holds|names|lies|cannot|belongs) ", line):
        found.append("does not say what it is about")
    found += [fault for one in COMMAND.findall(line) if (fault := complaint(one.strip())) is not None]
    plain = re.sub(r"`[^`]*`|\b(?:qemu-img|gunzip|mkdir|file -s) [^;()]*", "", COMMAND.sub("", line))
    own = re.sub(r"'[^']*'", "", plain)  # quotes of the user's input
    found += [f"names {one}" for one in re.findall(r"(?<![\w-])--[a-z][a-z-]+", own) if one not in OPTIONS[program]]
    names = [os.path.abspath(one.rstrip(":;,.)")) for one in NAME.findall(plain)]
    found += [f"names {one} twice" for one in sorted(set(names)) if names.count(one) > 1]
    three = []
    for part in re.split(r"\d+|\b[\da-f]{2}(?::[\da-f]{2})+", NAME.sub("0", plain.lower())):
        words = re.findall(r"[a-z][a-z'-]*", part)
        three += [" ".join(words[index : index + 3]) for index in range(len(words) - 2)]
    return found + [f"says {one!r} twice" for one in sorted(set(three)) if three.count(one) > 1]


def all_faults(program: str, commands: str, run: Callable[..., Result]) -> list[str]:
    """The faults of every command in a list; a command that does not fail is a fault of the list."""
    wrong = []
    for line in commands.strip().splitlines():
        result = run(*shlex.split(line.replace("LONG", LONG)))
        problems = faults(program, result.stderr) if result.exit_code else ["it did not fail"]
        wrong += [f"{program} {line}\n    {result.stderr.strip()}\n    {one}" for one in problems]
    return wrong


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Images and other files, good and bad, in the working folder; files that are called locked cannot be opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("a.vhd", "b.vhd", "base.vhd", "gone.vhd", "swap.vhd", "alone.vhd", "busy.vhd"):
        vhdkit.create_image(name, 8 * MIB)
    for child, parent in (("a.avhd", "a.vhd"), ("mid.avhd", "base.vhd"), ("leaf.avhd", "mid.avhd"),
                          ("orphan.avhd", "gone.vhd"), ("wrong.avhd", "swap.vhd")):  # fmt: skip
        vhdkit.create_child(child, parent)
    Path("gone.vhd").unlink()
    Path("swap.vhd").unlink()
    vhdkit.create_image("swap.vhd", 8 * MIB)
    for name in ("dir", "full", "far", "locked"):
        Path(name).mkdir()
    Path("full/file").touch()
    vhdkit.create_image("far/far.vhd", 8 * MIB)
    vhdkit.create_child("far/outside.avhd", "far/far.vhd")
    Path("far/outside.avhd").rename("outside.avhd")
    Path("far").rename("further")
    with vhdkit.open_disk("alone.vhd", writable=True) as disk:
        disk.write(7 * MIB, b"data" * 1024)
    whole = bytearray(Path("alone.vhd").read_bytes())
    Path("headless.vhd").write_bytes(bytes(512) + whole[512:-512] + bytes(512))
    Path("cookie.vhd").write_bytes(whole[:512] + b"notcxspa" + whole[520:])
    shutil.copy("base.vhd", "copy.vhd")
    for name, content in {
        "empty": b"", "empty.vhd": b"", "text.vhd": b"hello\n" * 100, "plain.raw": bytes(MIB), "cd.iso": bytes(MIB),
        "disk.qcow2": b"QFI\xfb\0\0\0\3" + bytes(65536), "disk.raw.gz": b"\x1f\x8b\x08" + bytes(100),
        "broken.json": b"{", "unknown.json": b'[{"name": "x", "pth": "y"}]', "note.undo": b"no", "locked.vhd": b"",
    }.items():  # fmt: skip
        Path(name).write_bytes(content)
    os.mkfifo("pipe")
    Path("loop.vhd").symlink_to("loop.vhd")
    real = os.open

    def guarded(path: str | bytes | int, *rest: object, **more: object) -> int:
        if not isinstance(path, int) and "locked" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", guarded)
    yield tmp_path


def test_vhdkit(folder: Path) -> None:
    """No failure of `vhdkit` says a thing twice, uses programmers' terms, or gives a hint that cannot be followed."""
    with vhdkit.open_disk("busy.vhd", writable=True):
        wrong = all_faults("vhdkit", VHDKIT, run_vhdkit)
    assert not wrong, "\n" + "\n".join(wrong)


def test_vmm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for `vmm`, with machines that do not run."""
    require_tool("qemu-system-x86_64")
    with machine_stage(folder, monkeypatch):
        for words in (
            "create web --disk a.avhd --cdrom cd.iso --accel tcg", "create box --accel tcg",
            "switch create lab --type private --backend user", "nic add web lab", "snapshot create web --name clean",
        ):  # fmt: skip
            made = run_vmm(*words.split())
            assert made.exit_code == 0, made.stderr
        wrong = all_faults("vmm", VMM, run_vmm)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.kvm
def test_vmm_of_a_running_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a running machine, with commands that are refused then."""
    require_tool("qemu-system-x86_64")
    with machine_stage(folder, monkeypatch) as manager:
        start(manager, folder)
        wrong = all_faults("vmm", RUNNING, run_vmm)
    assert not wrong, "\n" + "\n".join(wrong)


def start(manager: Manager, folder: Path) -> None:
    """A running machine `small`, and an image beside it that has a child."""
    make_machine(manager, folder)
    vhdkit.create_image("extra.vhd", 8 * MIB)
    vhdkit.create_child("extra.avhd", "extra.vhd")
    manager.start("small")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a.vhd: cannot open a.vhd", "names"),
        ("a.vhd: the file is short; it is empty; the file is short", "says 'the file is' twice"),
        ("web: is off; say --fly", "names --fly"),
        ("web: is off (vmm stop web --discard-saved)", "there is no --discard-saved"),
        ("web: is off (vmm nic jump web)", "there is no 'jump'"),
        ("has no snapshot 'x'", "does not say what it is about"),
        ("a.vhd: did you mean b?; see there", "doubled"),
        ("a.vhd: [Errno 2] gone", "says 'Errno'"),
        ("a.vhd: one\nvmm: two", "one line"),
    ],
)
def test_faults_are_found(line: str, fault: str) -> None:
    """Each kind of fault in a line is detected."""
    assert any(fault in one for one in faults("vmm", f"vmm: {line}\n"))


def test_a_good_line_has_no_fault() -> None:
    """A line with a path, what is wrong, and a command with the path is accepted."""
    assert faults("vmm", "vmm: a.vhd: the image does not exist (create it: vhdkit create a.vhd --size 10G)\n") == []


def texts(source: str) -> Iterator[str]:
    """The texts in a module that are not docstrings; X stands for the values of an f-string."""
    tree = ast.parse(source)
    apart = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            apart.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(one.value) if isinstance(one, ast.Constant) else "X" for one in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            yield node.value


def test_recommendations_in_the_source_exist() -> None:
    """A text in the code names only existing verbs with their options, and no option of the other program."""
    wrong = []
    for path, source in python_files("vhdkit", "vmm"):
        own = path.partition("/")[0]
        others = set().union(*OPTIONS.values()) - OPTIONS[own]
        for text in texts(source):
            found = [fault for one in COMMAND.findall(text) if (fault := complaint(one.strip())) is not None]
            if " " in (plain := re.sub(r"`[^`]*`", "", OTHER_PROGRAMS.sub("", COMMAND.sub("", text)))):
                found += [one for one in re.findall(r"(?<![\w-])--[a-z][a-z-]+", plain) if one in others]
            wrong += [f"{path}: {one}" for one in found]
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_group_without_a_verb_prints_its_help() -> None:
    """A group without a verb is not a failure: it prints its help, like the program alone."""
    for name, command in ((name, one) for root in ROOTS.items() for name, one in verbs(root[1], root[0])):
        if isinstance(command, click.Group):
            run = run_vmm if name.startswith("vmm") else run_vhdkit
            result = run(*name.split(" ")[1:])
            assert (result.exit_code, result.stderr) == (0, "") and result.stdout.startswith("Usage: "), name
