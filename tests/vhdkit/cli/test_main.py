# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: help, completion, and how every kind of invalid input ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.cli.running import COMMAND, VERBS, failure, finish, good, make_chain, run, start

OF_MOUNTS = ("umount", "mounts")  # they do not open an image
READERS = ("info", "chain", "check", "map", "dump")


def test_help_names_every_verb() -> None:
    """`vhdkit --help` and `vhdkit` alone list all verbs, the exit codes and how to enable completion."""
    text = good("--help")
    assert good() == text
    for verb in VERBS:
        assert f"\n  {verb} " in text
    assert "_VHDKIT_COMPLETE=bash_source" in text and "Exit codes" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    """The help of a verb says what --json prints and gives an example command."""
    text = good(verb, "--help")
    assert "Example" in text and re.search(rf"^ +vhdkit {verb}\b", text, re.MULTILINE)
    if verb in OF_MOUNTS:
        assert "--json" in text
    else:
        assert "With --json" in text and "--allow-parent-dir" in text and "--dynamic-bitmap" in text


def test_version() -> None:
    """--version prints one line."""
    assert good("--version").startswith("vhdkit ")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nosuch"], "nosuch"),
        (["info"], "IMAGE"),
        (["info", "a", "b"], "extra argument"),
        (["info", "--no-such-option", "a"], "--no-such-option"),
        (["info", ""], "cannot be empty"),
        (["create", "x.vhd"], "--size"),
        (["create", "x.vhd", "--size", "10 potatoes"], "10 potatoes"),
        (["info", "x", "--allow-parent-dir", "nowhere"], "nowhere"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], text: str) -> None:
    """A wrong command line ends with code 2 and one line that refers to the help."""
    line = failure(*words, code=2)
    assert text in line and "--help`" in line


def test_errors_as_json() -> None:
    """With --json an error is one JSON object on standard error, and standard output is empty."""
    Path("bad.vhd").write_bytes(b"x" * 4096)
    for words, kind, code in (
        (["info", "gone.vhd"], "NotFound", 1),
        (["info", "bad.vhd"], "CorruptImage", 3),
        (["info"], "UsageError", 2),
    ):
        result = run(*words, "--json")
        assert (result.exit_code, result.stdout) == (code, "")
        error = json.loads(result.stderr)["error"]
        assert (error["kind"], error["exit_code"]) == (kind, code) and error["message"]
    error = json.loads(run("info", "bad.vhd", "--json").stderr)["error"]
    assert error["path"] == "bad.vhd" and error["structure"] == "footer" and error["reason"] == "no-footer"
    assert error["offset_bytes"] == 4096 - 512


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("gone.vhd", 1, "No such file"),
        ("gone/x.vhd", 1, "No such file"),
        ("file/x.vhd", 1, "Not a directory"),
        ("folder", 2, "is a folder"),
        ("empty.vhd", 2, "is empty"),
        ("empty.raw", 2, "is empty"),
        ("fifo", 2, "is a pipe"),
        ("/dev/null", 2, "character device"),
        ("loop", 2, "symbolic links"),
        ("n" * 300, 2, "too long"),
        ("other.vmdk", 1, "VMDK"),
    ],
)
def test_a_wrong_path(verb: str, name: str, code: int, text: str) -> None:
    """A wrong path ends with one line and the code of its cause, and never blocks."""
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("empty.vhd").touch()
    Path("empty.raw").touch()
    Path("other.vmdk").write_bytes(b"KDMV" + bytes(4096))
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    assert text in failure(verb, name, code=code)


@pytest.mark.parametrize("verb", ["info", "chain", "map"])
def test_a_truncated_file(verb: str) -> None:
    """A VHD that has lost both footers is damaged: code 3, and the line says where the footer should be."""
    good("create", "x.vhd", "--size", "1M")
    Path("x.vhd").write_bytes(Path("x.vhd").read_bytes()[:300])
    assert "footer at byte 0x0" in failure(verb, "x.vhd", code=3)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permission")
@pytest.mark.parametrize("words", [["info", "x.vhd"], ["map", "x.vhd"], ["convert", "x.vhd", "y.raw", "--to", "raw"]])
def test_no_permission(words: list[str], folder: Path) -> None:
    """A file that cannot be read, and a folder that cannot be written to or searched: code 1, one line."""
    good("create", "x.vhd", "--size", "1M")
    folder.chmod(0o755)
    Path("closed").mkdir(mode=0o700)
    Path("x.vhd").chmod(0)
    os.seteuid(65534)
    try:
        assert "x.vhd: cannot open: Permission denied" in failure(*words, code=1)
        assert "Permission denied" in failure("create", "z.vhd", "--size", "1M", code=1)
        assert "Permission denied" in failure("create", "closed/z.vhd", "--size", "1M", code=1)
        assert "Permission denied" in failure("info", "closed/z.vhd", code=1)
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a loop device")
def test_a_block_device(folder: Path) -> None:
    """A block device is treated as a raw disk."""
    Path("disk.raw").write_bytes(b"\x55" * (1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", "disk.raw"], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        assert "raw image" in good("info", device)
        good("convert", device, "copy.vhd", "--to", "dynamic")
        assert "equal" in good("compare", device, "copy.vhd")
        assert "is not replaced" in failure("convert", "copy.vhd", device, "--to", "raw", "--force", code=2)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("words", [["map", "x.vhd"], ["check", "x.vhd"], ["convert", "x.vhd", "y", "--to", "raw"]])
def test_in_use(words: list[str]) -> None:
    """An image that another program is writing to: code 5, and no file is made."""
    good("create", "x.vhd", "--size", "1M")
    with vhdkit.open_disk("x.vhd", writable=True):
        assert "another program" in failure(*words, code=5)
    assert not Path("y").exists()


def test_info_chain_and_dump_work_on_an_image_in_use() -> None:
    """Three verbs need no lock, and the first two report that the image is in use."""
    good("create", "x.vhd", "--size", "1M")
    with vhdkit.open_disk("x.vhd", writable=True):
        assert "another program is writing to it" in good("info", "x.vhd")
        assert "in use" in good("chain", "x.vhd")
        assert "cxsparse" in good("dump", "x.vhd")


def test_control_characters_in_names() -> None:
    """Control characters of a name are escaped; markup and wide characters are printed unchanged."""
    good("create", "[red]x[bold] ü日.vhd", "--size", "1M")
    for verb in READERS:
        text = good(verb, "[red]x[bold] ü日.vhd")
        assert verb == "dump" or "[red]x[bold] ü日.vhd" in text
    evil = "a\x1b[31m\n.vhd"
    good("create", evil, "--size", "1M")
    for words in (["info", evil], ["chain", evil], ["check", evil], ["map", evil], ["compare", evil, evil]):
        assert "\x1b" not in good(*words)
    assert "\\x1b" in failure("create", evil, "--size", "1M", code=1)


def test_names_that_are_not_utf_8() -> None:
    """A name that is not UTF-8 works, and JSON shows its bytes in readable form."""
    name = os.fsdecode(b"\xff\xfe.vhd")
    good("create", name, "--size", "1M")
    assert "\\udcff" in good("info", name)
    assert json.loads(good("info", name, "--json"))["path"] == r"\xff\xfe.vhd"


def test_an_unforeseen_exception_is_reported_as_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one line that says so; the traceback appears only with --verbose or VHDKIT_DEBUG."""

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by\x1bnought")

    monkeypatch.setattr("vhdkit.cli.describe.describe_image", broken)
    line = failure("info", "x.vhd", code=1)
    assert "ZeroDivisionError: by\\x1bnought" in line and "bug" in line
    assert "Traceback" in run("info", "x.vhd", "--verbose").stderr
    monkeypatch.setenv("VHDKIT_DEBUG", "1")
    assert "Traceback" in run("info", "x.vhd").stderr


def test_a_closed_pipe(folder: Path) -> None:
    """If the reader has gone, the command ends silently."""
    make_chain()
    for words in (["convert", "leaf.avhd", "-", "--to", "raw"], ["map", "leaf.avhd", "--json"]):
        process = start(*words)
        assert process.stdout is not None and process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr is not None and process.stderr.read() == b""
        process.stderr.close()


def test_a_full_output_device() -> None:
    """Standard output on a full device: code 7 and one line."""
    good("create", "x.vhd", "--size", "1M")
    with open("/dev/full", "wb") as full:
        code, _, errors = finish(start("info", "x.vhd", stdout=full))
    assert code == 7 and errors.startswith("vhdkit: standard output") and errors.count("\n") == 1


def test_closed_standard_streams() -> None:
    """Without standard streams output is dropped, and a pipe is refused."""
    good("create", "x.vhd", "--size", "1M")
    shell = 'exec "$@" >&- <&-'
    for words, code in ((["info", "x.vhd"], 0), (["convert", "x.vhd", "-", "--to", "raw"], 2)):
        command = ["bash", "-c", shell, "bash", *COMMAND, *words]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == code and "bug" not in done.stderr, done.stderr


def test_shell_completion() -> None:
    """The documented line makes bash load a script that completes the verbs."""
    script = finish(start(env={"_VHDKIT_COMPLETE": "bash_source"}))
    assert script[0] == 0 and "complete " in script[1]
    words = {"_VHDKIT_COMPLETE": "bash_complete", "COMP_WORDS": "vhdkit c", "COMP_CWORD": "1"}
    code, answer, _ = finish(start(env=words))
    assert code == 0
    assert [line.split(",")[1] for line in answer.splitlines()] == [
        "create",
        "chain",
        "check",
        "convert",
        "compare",
        "clone",
        "compact",
        "ctl",
    ]


def test_warnings_of_the_library_are_lines_of_the_command() -> None:
    """What the library logs is printed on standard error as a warning, once, and the output stays as it is."""
    good("create", "base.vhdx", "--size", "4M")
    good("create", "leaf.avhdx", "--parent", "base.vhdx")
    Path("leaf.avhdx.rct").touch()
    code, output, said = finish(start("rebase", "leaf.avhdx", "--parent", "base.vhdx", "--json"))
    assert code == 0 and json.loads(output)["path"] == "leaf.avhdx"
    assert said.startswith("vhdkit: warning: ") and said.count("leaf.avhdx.rct") == len(said.splitlines()) == 1
