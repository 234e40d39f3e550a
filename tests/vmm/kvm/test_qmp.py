# SPDX-License-Identifier: Apache-2.0
"""The monitor's client, with a scripted QEMU and a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import require_tool
from tests.waiting import until
from vmm.kvm.qmp import ConnectionEnded, Qmp
from vmm.model.errors import AgentUnavailable, QemuFailed, TimedOut

Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    with tempfile.TemporaryDirectory(prefix="vmm-qmp-") as name:
        yield Path(name)


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The requests received; the messages are consecutive JSON values, not lines."""
    text = ""
    while piece := await reader.read(4096):
        text += piece.decode()
        while text := text.lstrip():
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield request


@contextlib.asynccontextmanager
async def played(path: Path, answer: Answer, *, greets: bool = True) -> AsyncIterator[None]:
    """A server at the socket that answers each request with the result of `answer`, and hangs up after {"end":
    ...}."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if greets:
            writer.write(json.dumps(GREETING).encode() + b"\n")
        async for request in requests(reader):
            if request["execute"] == "qmp_capabilities":
                replies: list[dict[str, Any]] = [{"return": {}}]
            else:
                replies = answer(request)
            for reply in replies:
                if "end" in reply:
                    writer.close()
                    return
                named = reply if "event" in reply or "id" not in request else {**reply, "id": request["id"]}
                writer.write(json.dumps(named).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene, in bounded time."""
    asyncio.run(asyncio.wait_for(scene(), 30))


def test_result_and_argument_names(folder: Path) -> None:
    """The result is returned, and an argument `fdset_id` is sent as `fdset-id`."""
    seen = []

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        seen.append(request.get("arguments"))
        return [{"return": {"status": "running"}}]

    async def scene() -> None:
        async with played(folder / "q", answer):
            qmp = await Qmp.connect(str(folder / "q"))
            assert await qmp.execute("query-status", fdset_id=3) == {"status": "running"}
            await qmp.close()
            await qmp.close()

    run(scene)
    assert seen == [{"fdset-id": 3}]


def test_refusal_is_qemu_failed_and_names_the_log(folder: Path) -> None:
    """QEMU's own words are in the log, and the connection can be used afterwards."""

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        if request["execute"] == "cont":
            return [{"error": {"class": "GenericError", "desc": "No such thing"}}]
        return [{"return": 5}]

    async def scene() -> None:
        async with played(folder / "q", answer):
            qmp = await Qmp.connect(str(folder / "q"))
            with pytest.raises(QemuFailed, match=r"refused cont .*vmm logs"):
                await qmp.execute("cont")
            assert await qmp.execute("query-x") == 5
            await qmp.close()

    run(scene)


def test_no_answer_is_timed_out_and_ends_the_connection(folder: Path) -> None:
    """After a time-out every request fails: a late answer would be mistaken for another request's."""

    async def scene() -> None:
        async with played(folder / "q", lambda request: []):
            qmp = await Qmp.connect(str(folder / "q"))
            with pytest.raises(TimedOut, match="did not answer stop within"):
                await qmp.execute("stop", timeout_seconds=0.05)
            assert not qmp.is_connected
            with pytest.raises(QemuFailed):
                await qmp.execute("query-status")

    run(scene)


def test_events_come_in_order_and_end_with_the_connection(folder: Path) -> None:
    """Every event sent before QEMU hung up is delivered, then the iteration ends."""

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = [
            {"event": name, "data": {}, "timestamp": {}} for name in ("STOP", "RESUME", "SHUTDOWN")
        ]
        return [*events, {"return": {}}, {"end": True}]

    async def scene() -> None:
        async with played(folder / "q", answer):
            qmp = await Qmp.connect(str(folder / "q"))
            await qmp.execute("quit")
            assert [event["event"] async for event in qmp.events()] == ["STOP", "RESUME", "SHUTDOWN"]
            await asyncio.wait_for(qmp.wait_closed(), 5)
            await qmp.close()

    run(scene)


def test_hanging_up_in_the_middle_of_a_command(folder: Path) -> None:
    """If QEMU dies instead of answering, all waiting callers get QemuFailed, with the command."""

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"end": True}] if request["execute"] == "stop" else []

    async def scene() -> None:
        async with played(folder / "q", answer):
            qmp = await Qmp.connect(str(folder / "q"))
            results = await asyncio.gather(qmp.execute("query-a"), qmp.execute("stop"), return_exceptions=True)
            assert [type(one) for one in results] == [ConnectionEnded, ConnectionEnded]
            assert "closed the connection during stop" in str(results[1])
            await qmp.close()

    run(scene)


@pytest.mark.parametrize("text", [b"", b"garbage\n", b'{"no": "greeting"}\n', b"\xff\xfe\n"])
def test_a_server_without_a_greeting_is_not_a_qemu(folder: Path, text: bytes) -> None:
    """Hanging up, garbage and other protocols lead to one clear error, not a traceback of the client."""

    async def scene() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(text)
            writer.close()

        server = await asyncio.start_unix_server(serve, folder / "q")
        with pytest.raises(QemuFailed, match="cannot talk to QEMU"):
            await Qmp.connect(str(folder / "q"))
        server.close()
        await server.wait_closed()

    run(scene)


def test_a_socket_without_a_server(folder: Path) -> None:
    """A missing socket, and one without a listener, are QemuFailed with the path."""

    async def scene() -> None:
        with pytest.raises(QemuFailed, match="No such file") as caught:
            await Qmp.connect(str(folder / "absent"))
        assert caught.value.path == str(folder / "absent")

    run(scene)


def test_silence_is_timed_out(folder: Path) -> None:
    """If the server accepts and sends nothing, the client stops waiting."""

    async def scene() -> None:
        async with played(folder / "q", lambda request: [], greets=False):
            with pytest.raises(TimedOut, match="sent no greeting"):
                await Qmp.connect(str(folder / "q"), timeout_seconds=0.05)

    run(scene)


def test_agent_is_synchronised_first(folder: Path) -> None:
    """The agent has no greeting; it is asked to repeat a number first, then commands work."""

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        if request["execute"] == "guest-sync":
            return [{"return": request["arguments"]["id"]}]
        return [{"return": {"name": request["execute"]}}]

    async def scene() -> None:
        async with played(folder / "a", answer, greets=False):
            agent = await Qmp.connect_agent(str(folder / "a"))
            assert await agent.execute("guest-get-osinfo") == {"name": "guest-get-osinfo"}
            await agent.close()

    run(scene)


def test_silent_and_lying_agents_are_unavailable(folder: Path) -> None:
    """A channel without answers, or with wrong ones, is AgentUnavailable."""

    async def scene() -> None:
        async with played(folder / "a", lambda request: [], greets=False):
            with pytest.raises(AgentUnavailable, match="does not answer"):
                await Qmp.connect_agent(str(folder / "a"), timeout_seconds=0.05)
        async with played(folder / "b", lambda request: [{"return": -1}], greets=False):
            with pytest.raises(AgentUnavailable, match="another program"):
                await Qmp.connect_agent(str(folder / "b"), timeout_seconds=1)

    run(scene)


def keep_descriptors(listener: socket.socket, names: dict[str, int]) -> None:
    """A monitor that treats descriptors as QEMU does: a name is given to the newest one that arrived.

    It reads slowly, so that a caller that does not wait is read together with the next one. `names`: name -> inode.
    """
    link, _ = listener.accept()
    newest: int | None = None
    text = ""
    with link:
        link.sendall(json.dumps(GREETING).encode() + b"\n")
        while True:
            time.sleep(0.005)  # slow, as said above
            piece, ancillary, _, _ = link.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            if not piece:
                break
            for _, _, data in ancillary:
                if newest is not None:
                    os.close(newest)
                (newest,) = struct.unpack("@i", data[:4])
            text += piece.decode()
            while text := text.lstrip():
                request, end = json.JSONDecoder().raw_decode(text)
                text = text[end:]
                arguments = request.get("arguments", {})
                reply: dict[str, Any] = {"return": {}}
                if request["execute"] in ("getfd", "add-fd"):
                    if newest is None:
                        reply = {"error": {"class": "GenericError", "desc": "No file descriptor supplied"}}
                    else:
                        names[str(arguments.get("fdname", arguments.get("fdset-id")))] = os.fstat(newest).st_ino
                        os.close(newest)
                        newest = None
                named = {**reply, "id": request["id"]} if "id" in request else reply
                link.sendall(json.dumps(named).encode() + b"\n")


def test_descriptors_of_several_tasks_get_their_own_names(folder: Path) -> None:
    """INV-DESCRIPTOR-NAMED: with memory, a picture and an adapter at once, each descriptor has the name it was sent
    for."""
    names: dict[str, int] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "q"))
    listener.listen()
    monitor = threading.Thread(target=keep_descriptors, args=(listener, names), daemon=True)
    monitor.start()

    async def scene() -> None:
        with contextlib.ExitStack() as files:
            wanted = {name: files.enter_context((folder / name).open("wb")) for name in "abcdef"}
            sets = {str(number): files.enter_context((folder / str(number)).open("wb")) for number in range(6)}
            qmp = await Qmp.connect(str(folder / "q"))
            abandoned = asyncio.create_task(qmp.send_descriptor("abandoned", files.enter_context(
                (folder / "abandoned").open("wb")).fileno()))  # fmt: skip
            await asyncio.sleep(0)  # it begins
            abandoned.cancel()  # the caller is gone, and the next one still waits its turn
            await asyncio.gather(
                *(qmp.send_descriptor(name, file.fileno()) for name, file in wanted.items()),
                *(qmp.add_descriptor_to_set(int(number), file.fileno()) for number, file in sets.items()),
                qmp.execute("query-status"),
            )
            await qmp.close()
            expected = {name: os.fstat(file.fileno()).st_ino for name, file in (wanted | sets).items()}
        names.pop("abandoned", None)
        assert names == expected

    try:
        run(scene)
    finally:
        listener.close()
        monitor.join(10)


@pytest.mark.kvm
def test_real_qemu(folder: Path) -> None:
    """A real monitor: status, a descriptor handed over, an unknown command, events at the end."""
    program = require_tool("qemu-system-x86_64")
    path = folder / "q"
    process = subprocess.Popen(
        [program, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    )

    async def scene() -> None:
        await until(lambda: path.exists() or process.poll() is not None, "QEMU listens")
        assert process.poll() is None
        qmp = await Qmp.connect(str(path))
        assert (await qmp.execute("query-status"))["status"] in ("running", "prelaunch")
        with (folder / "f").open("wb") as file:
            await qmp.send_descriptor("state", file.fileno())
            await qmp.add_descriptor_to_set(5, file.fileno())
            names = [f"state-{number}" for number in range(50)]  # INV-DESCRIPTOR-NAMED
            await asyncio.gather(
                *(qmp.send_descriptor(name, file.fileno()) for name in names),
                *(qmp.add_descriptor_to_set(6, file.fileno()) for _ in names),
            )
            for name in names:
                await qmp.execute("closefd", fdname=name)  # it is there
        sets = {one["fdset-id"]: len(one["fds"]) for one in await qmp.execute("query-fdsets")}
        assert sets == {5: 1, 6: len(names)}
        with pytest.raises(QemuFailed, match="refused fly"):
            await qmp.execute("fly")
        await qmp.execute("quit")
        assert [event["event"] async for event in qmp.events()] == ["SHUTDOWN"]
        await qmp.close()

    try:
        run(scene)
    finally:
        process.kill()
        process.wait()
