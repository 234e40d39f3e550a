# SPDX-License-Identifier: Apache-2.0
"""The key-value exchange: pools and limits, misbehaving guests, and a real guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_linux_guest, require_qemu
from tests.vmm.guests import launch, linux
from tests.vmm.guests.shell import GuestShell
from tests.waiting import until
from vmm.kvm import key_value
from vmm.kvm.key_value import MAX_ITEMS, MAX_KEY_BYTES, MAX_LINE_BYTES, MAX_VALUE_BYTES, KeyValueChannel, KeyValueStore
from vmm.model.errors import AgentUnavailable, InvalidSpec, NotFound, VmmError


class Port:
    """QEMU's end of the port, and a guest on it."""

    def __init__(self) -> None:
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.connected = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.connected.set()

    async def read(self) -> dict[str, Any]:
        """The host's next message."""
        async with asyncio.timeout(30):
            message: dict[str, Any] = json.loads(await self.reader.readline())
        return message

    async def ask(self, message: object, *, raw: bytes | None = None) -> dict[str, Any]:
        """Send a message (or raw bytes); return the host's next one."""
        self.writer.write(raw if raw is not None else json.dumps(message).encode() + b"\n")
        return await self.read()


@contextlib.asynccontextmanager
async def channel_of(folder: Path) -> AsyncIterator[tuple[KeyValueChannel, KeyValueStore, Port]]:
    """A channel, its store, and a guest whose port is connected and has received the host's hello."""
    port = Port()
    server = await asyncio.start_unix_server(port.serve, folder / "kvp.sock")
    store = KeyValueStore(str(folder / "items.json"))
    channel = KeyValueChannel(str(folder / "kvp.sock"), store, machine="web")
    running = asyncio.create_task(channel.run())
    try:
        async with asyncio.timeout(30):
            await port.connected.wait()
        assert await port.read() == {"op": "hello"}
        yield channel, store, port
    finally:
        running.cancel()
        await asyncio.wait({running})
        port.writer.close()
        server.close()


def test_the_store_is_kept(tmp_path: Path) -> None:
    """Saved items can be read again, in both pools, whatever the text."""
    path = str(tmp_path / "items.json")
    store = KeyValueStore(path)
    store.set("host", "name", 'line\n"quoted" \\ üñí 日本 \t')
    store.set("guest", "empty", "")
    store.save()
    again = KeyValueStore(path)
    assert again.items("host") == {"name": 'line\n"quoted" \\ üñí 日本 \t'}
    assert again.items("guest") == {"empty": ""}
    again.delete("guest", "empty")
    with pytest.raises(NotFound):
        again.get("guest", "empty")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"host": 1}', b'{"host": {}}', b"\xff", b"[" * 100000])
def test_a_damaged_store(tmp_path: Path, content: bytes) -> None:
    """A damaged file is an error that names it."""
    (tmp_path / "items.json").write_bytes(content)
    with pytest.raises(VmmError, match="damaged"):
        KeyValueStore(str(tmp_path / "items.json"))


def test_limits(tmp_path: Path) -> None:
    """Each limit allows its value and refuses one more."""
    store = KeyValueStore(str(tmp_path / "items.json"))
    store.set("host", "k" * MAX_KEY_BYTES, "v" * MAX_VALUE_BYTES)
    for key, value in ("k" * (MAX_KEY_BYTES + 1), ""), ("k", "v" * (MAX_VALUE_BYTES + 1)), ("ü" * 300, ""):
        with pytest.raises(InvalidSpec, match="the limit is"):
            store.set("host", key, value)
    for key in "", "a\nb", "a\0":
        with pytest.raises(InvalidSpec):
            store.set("host", key, "v")
    with pytest.raises(InvalidSpec):
        store.set("host", "\ud800", "v")
    for number in range(MAX_ITEMS - 1):
        store.set("host", f"key{number}", "v")
    with pytest.raises(InvalidSpec, match=f"{MAX_ITEMS} items"):
        store.set("host", "one more", "v")
    store.set("host", "key0", "replacing is fine")


def test_a_channel_that_is_switched_off(tmp_path: Path) -> None:
    """It refuses requests, and never connects."""

    async def scene() -> None:
        store = KeyValueStore(str(tmp_path / "items.json"))
        channel = KeyValueChannel(str(tmp_path / "missing"), store, is_on=False, machine="web")
        await channel.run()
        with pytest.raises(AgentUnavailable, match=r"web.*key-value"):
            await channel.set("k", "v")

    asyncio.run(scene())


def test_both_directions(tmp_path: Path) -> None:
    """The guest sets, gets, lists and deletes items; the host's changes reach it and are acknowledged."""

    async def scene() -> None:
        async with channel_of(tmp_path) as (channel, store, port):
            assert await channel.set("early", "sent at hello") is False
            assert not channel.is_present
            said = await port.ask({"op": "hello"})
            assert (said["op"], said["key"], said["value"]) == ("set", "early", "sent at hello")
            assert channel.is_present
            telling = asyncio.create_task(channel.set("colour", "blue"))
            said = await port.read()
            assert (said["op"], said["key"], said["value"]) == ("set", "colour", "blue")
            port.writer.write(json.dumps({"id": said["id"], "ok": True}).encode() + b"\n")
            assert await telling is True
            assert await port.ask({"id": 1, "op": "get", "key": "colour"}) == {"id": 1, "ok": True, "value": "blue"}
            assert await port.ask({"id": 2, "op": "set", "key": "ip", "value": "10.0.0.5"}) == {"id": 2, "ok": True}
            assert channel.items("guest") == {"ip": "10.0.0.5"}
            assert await port.ask({"id": 3, "op": "list", "pool": "host"}) == {
                "id": 3, "key": "colour", "value": "blue",
            }  # fmt: skip
            assert (await port.read())["key"] == "early"
            assert await port.read() == {"id": 3, "ok": True, "count": 2}
            assert (await port.ask({"id": 4, "op": "delete", "key": "ip"}))["ok"] is True
            assert channel.items("guest") == {}
            for wrong in (
                {"id": 5, "op": "get", "key": "nothing"},
                {"id": 5, "op": "set", "pool": "host", "key": "a", "value": "b"},
                {"id": 5, "op": "fly"}, {"id": 5, "op": "get", "key": 7}, {"id": 5, "op": "list", "pool": "sea"},
                {"id": 5, "op": "set", "key": "k", "value": "v" * (MAX_VALUE_BYTES + 1)},
            ):  # fmt: skip
                answer = await port.ask(wrong)
                assert (answer["id"], answer["ok"]) == (5, False) and answer["error"]
            assert store.items("host") == {"colour": "blue", "early": "sent at hello"}

    asyncio.run(scene())


def test_a_guest_that_does_not_acknowledge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that the guest does not acknowledge is kept, and the caller learns that it was not acknowledged."""
    monkeypatch.setattr(key_value, "ACKNOWLEDGE_SECONDS", 0.1)

    async def scene() -> None:
        async with channel_of(tmp_path) as (channel, store, port):
            port.writer.write(b'{"op":"hello"}\n')
            await until(lambda: channel.is_present, "the guest is connected")
            assert await channel.set("k", "v") is False
            assert store.get("host", "k") == "v"
            waiting = asyncio.create_task(channel.set("k", "w"))
            await asyncio.sleep(0.01)  # now it waits for the acknowledgement
            channel.port_changed(False)  # no wait for a guest that is gone
            assert await waiting is False and not channel.is_present

    asyncio.run(scene())


def test_malformed_lines(tmp_path: Path) -> None:
    """Lines that are not messages, too long or without an end are refused, and the conversation continues."""

    async def scene() -> None:
        async with channel_of(tmp_path) as (_, store, port):
            for line in (b"\xff\xfe\n", b"[" * 10000 + b"\n", b"5\n", b'{"id": true, "op": "hello"}\n', b"{}\n",
                         b'{"id": 1e999, "op": "hello"}\n', b"x" * (MAX_LINE_BYTES * 5) + b"\n"):  # fmt: skip
                assert (await port.ask(None, raw=line))["ok"] is False, line[:40]
            assert (await port.ask({"id": 1, "op": "set", "key": "still", "value": "here"}))["ok"] is True
            assert store.get("guest", "still") == "here"

    asyncio.run(scene())


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes(lines: list[bytes]) -> None:
    """Any line is answered with a message or ignored; it never causes an error of Python's."""

    class Sink:
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    channel = KeyValueChannel("", KeyValueStore("/nonexistent/items"))
    sink = Sink()
    channel._writer = sink  # type: ignore[assignment]
    channel._save_soon = lambda: None  # type: ignore[method-assign]
    for line in lines:
        channel._received(line)
    for answer in sink.data.splitlines():
        assert isinstance(json.loads(answer), dict)


def test_the_channel_connects_again(tmp_path: Path) -> None:
    """When QEMU is restarted, the channel connects again, and the guest's items are kept."""

    async def scene() -> None:
        async with channel_of(tmp_path) as (_, _, port):
            assert (await port.ask({"id": 1, "op": "set", "key": "k", "value": "v"}))["ok"] is True
            port.connected.clear()
            port.writer.close()
            async with asyncio.timeout(30):
                await port.connected.wait()
            assert await port.read() == {"op": "hello"}

    asyncio.run(scene())
    assert KeyValueStore(str(tmp_path / "items.json")).get("guest", "k") == "v"


@pytest.mark.kvm
@pytest.mark.nightly  # every day the same, with a worker in between (tests/vmm/api/test_guest_access.py)
def test_real_guest(tmp_path: Path) -> None:
    """A shell script in a Linux guest exchanges items in both directions over the virtio port."""
    built = require_linux_guest()
    words = [
        "-kernel", str(built.kernel), "-initrd", str(built.initrd), "-append", built.append,
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=kvp,path={tmp_path}/kvp.sock,server=on,wait=off",
        "-device", f"virtserialport,chardev=kvp,name={key_value.PORT_NAME},id=kvp",
    ]  # fmt: skip
    with (
        launch.running(require_qemu(), tmp_path, *words, memory=linux.MEMORY) as guest,
        GuestShell(guest.serial) as shell,
    ):

        async def scene() -> None:
            store = KeyValueStore(str(tmp_path / "items.json"))
            store.set("host", "before", "set while it was off")
            channel = KeyValueChannel(str(tmp_path / "kvp.sock"), store)
            running = asyncio.create_task(channel.run())
            in_guest = asyncio.to_thread
            await in_guest(shell.wait_ready)
            assert await in_guest(shell.check, "kvp set address 10.0.0.5") == '{"id":1,"ok":true}'
            assert channel.get("guest", "address") == "10.0.0.5"
            assert channel.is_present
            assert await in_guest(shell.check, "cat /run/kvp/host/before") == "set while it was off"
            assert await channel.set("say", 'a "quoted" \\ word') is True
            assert await in_guest(shell.check, "cat /run/kvp/host/say") == 'a "quoted" \\ word'
            assert '"value":"10.0.0.5"' in await in_guest(shell.check, "kvp list guest")
            assert '"value":"set while it was off"' in await in_guest(shell.check, "kvp get before")
            refused = await in_guest(shell.run, "kvp get nothing")
            assert refused.exit_code != 0 and "has no item" in refused.output
            assert await channel.delete("say") is True
            assert (await in_guest(shell.run, "cat /run/kvp/host/say")).exit_code != 0
            running.cancel()
            await asyncio.wait({running})

        asyncio.run(scene())
