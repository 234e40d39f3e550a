# SPDX-License-Identifier: Apache-2.0
"""The key-value data exchange: short texts that a machine and its host exchange.

Decides what an item may be, who may change which pool, the protocol on the machine's virtio port `org.vmm.kvp.0`, and
that the host keeps both pools: they exist while the guest is down, and a guest that starts is sent the host's items.
Must not know what items mean, or who asks on the host.

    pool "host"     the host sets, the guest reads          pool "guest"    the guest sets, the host reads

A message is a JSON object on a line of its own, at most MAX_LINE_BYTES including its end. From the guest:
    {"op": "hello"}                                    the guest is present: send the host's items (as sets, below)
    {"id": 1, "op": "get", "key": K, "pool": P}        -> {"id": 1, "ok": true, "value": V}    (P: "host" unless given)
    {"id": 2, "op": "list", "pool": P}                 -> {"id": 2, "key": K, "value": V} each, then
                                                          {"id": 2, "ok": true, "count": N}
    {"id": 3, "op": "set", "key": K, "value": V}       -> {"id": 3, "ok": true}
    {"id": 4, "op": "delete", "key": K}                -> {"id": 4, "ok": true}
    anything else                                      -> {"id": ID or null, "ok": false, "error": "why"}

From the host, when an item of its pool changes: {"id": 5, "op": "set", "key": K, "value": V} and {"id": 6, "op":
"delete", "key": K}, which the guest answers with {"id": 5, "ok": true} when it has accepted it. A worker that starts
sends {"op": "hello"}, which asks the guest to do the same.

The guest is not trusted: lines, keys, values and items are bounded (by Hyper-V's limits where it has any), nothing is
read from a guest that does not read, and what it sets is written to the host's disk at most once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

from vmm.model.errors import AgentUnavailable, InvalidSpec, NotFound, VmmError, of_os_error
from vmm.model.guest import ExchangedItem
from vmm.model.paths import write_whole

Pool = Literal["host", "guest"]
POOLS: Final[tuple[Pool, ...]] = get_args(Pool)
PORT_NAME: Final = "org.vmm.kvp.0"
MAX_KEY_BYTES: Final = 512  # Hyper-V's HV_KVP_EXCHANGE_MAX_KEY_SIZE
MAX_VALUE_BYTES: Final = 2048  # and its HV_KVP_EXCHANGE_MAX_VALUE_SIZE
MAX_ITEMS: Final = 256  # per pool: with the limits above, its file stays below 1 MiB
MAX_LINE_BYTES: Final = 16 * 1024  # fits a set whose every byte is escaped as \u00xx
MAX_FILE_BYTES: Final = 8 * 1024 * 1024
ACKNOWLEDGE_SECONDS: Final = 2.0
RECONNECT_SECONDS: Final = 0.5
SAVE_SECONDS: Final = 1.0


class KeyValueStore:
    """Both pools of one machine, in memory and in a file of its folder."""

    def __init__(self, path: str) -> None:
        """Read the file; a missing file counts as empty. Raises VmmError for a damaged one."""
        self._path = path
        self._pools: dict[Pool, dict[str, str]] = {pool: {} for pool in POOLS}
        try:
            with open(path, "rb") as file:
                document = json.loads(file.read(MAX_FILE_BYTES))
            for pool in POOLS:
                self._pools[pool].update({str(key): str(value) for key, value in document[pool].items()})
        except FileNotFoundError:
            pass
        except OSError as error:
            raise of_os_error(error, "read the exchanged items", path=path) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VmmError("is damaged: it must contain exchanged items", path=path, hint="remove it") from error

    def items(self, pool: Pool) -> dict[str, str]:
        """All items of a pool, by key."""
        return dict(sorted(self._pools[pool].items()))

    def get(self, pool: Pool, key: str) -> str:
        """The value of a key. Raises NotFound."""
        try:
            return self._pools[pool][key]
        except KeyError:
            raise NotFound(f"the {pool} has no item {key[:MAX_KEY_BYTES]!r}") from None

    def set(self, pool: Pool, key: str, value: str) -> None:
        """Add or replace an item, in memory. Raises InvalidSpec for an invalid item."""
        check_item(key, value)
        items = self._pools[pool]
        if key not in items and len(items) >= MAX_ITEMS:
            raise InvalidSpec(f"the {pool} already has {MAX_ITEMS} items, which is the limit")
        items[key] = value

    def delete(self, pool: Pool, key: str) -> None:
        """Remove an item, in memory. Raises NotFound."""
        self.get(pool, key)
        del self._pools[pool][key]

    def save(self, *, durable: bool = True) -> None:
        """Write both pools to the file, atomically. Raises VmmError."""
        content = json.dumps(self._pools, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"
        write_whole(self._path, content, durable=durable)


def check_item(key: str, value: str) -> None:
    """Raise InvalidSpec for an invalid item."""
    for what, text, limit in (("key", key, MAX_KEY_BYTES), ("value", value, MAX_VALUE_BYTES)):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidSpec(f"the {what} is not text") from None
        if length > limit:
            raise InvalidSpec(f"the {what} has {length} bytes, the limit is {limit}")
        if "\0" in text:
            raise InvalidSpec(f"a {what} must not contain a zero byte")
    if not key or not key.isprintable():
        raise InvalidSpec("a key must consist of printable characters and not be empty")


class KeyValueChannel:
    """The host's side of one running machine's port. For one event loop."""

    def __init__(self, path: str, store: KeyValueStore, *, is_on: bool = True, machine: str | None = None) -> None:
        """`path`: QEMU's end of the port. Nothing is connected yet; with `is_on` False, nothing ever is."""
        self._path = path
        self._store = store
        self._is_on = is_on
        self._machine = machine
        self._writer: asyncio.StreamWriter | None = None
        self._is_present = False  # the guest said hello and has not left since
        self._number = 0
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._saving: asyncio.Task[None] | None = None

    @property
    def is_present(self) -> bool:
        """True while a program in the guest takes part in the exchange."""
        return self._is_present

    def port_changed(self, is_open: bool) -> None:
        """The guest opened or closed the port."""
        if not is_open:
            self._gone()

    # -- requests of the host ---------------------------------------------------------------------------------------

    def items(self, pool: Pool) -> dict[str, str]:
        """All items of a pool. Raises AgentUnavailable if the exchange is switched off."""
        self._need()
        return self._store.items(pool)

    def get(self, pool: Pool, key: str) -> str:
        """The value of a key. Raises NotFound, AgentUnavailable."""
        self._need()
        return self._store.get(pool, key)

    async def set(self, key: str, value: str) -> bool:
        """Set an item of the host's pool, durably. True if the guest has accepted it, False if it gets it later.

        Raises InvalidSpec, AgentUnavailable, NoSpace.
        """
        self._need()
        self._store.set("host", key, value)
        self._store.save()
        return await self._tell({"op": "set", "key": key, "value": value})

    async def delete(self, key: str) -> bool:
        """Remove an item of the host's pool. True if the guest has accepted it. Raises NotFound, AgentUnavailable."""
        self._need()
        self._store.delete("host", key)
        self._store.save()
        return await self._tell({"op": "delete", "key": key})

    def _need(self) -> None:
        if not self._is_on:
            raise AgentUnavailable(
                "the integration service key-value is switched off for this machine", machine=self._machine
            )

    async def _tell(self, message: dict[str, Any]) -> bool:
        if self._writer is None or not self._is_present:
            return False
        self._number += 1
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = answered
        try:
            self._send({"id": self._number, **message})
            return await asyncio.wait_for(answered, ACKNOWLEDGE_SECONDS)
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(self._number, None)

    # -- the conversation -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the conversation until cancelled; QEMU may come and go meanwhile."""
        if not self._is_on:
            return
        try:
            while True:
                with contextlib.suppress(OSError):
                    await self._converse()
                await asyncio.sleep(RECONNECT_SECONDS)  # between two attempts, for as long as the machine runs
        finally:
            if self._saving is not None:
                self._saving.cancel()
                with contextlib.suppress(VmmError):
                    self._store.save(durable=False)

    async def _converse(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._path)
        self._writer = writer
        line = bytearray()
        is_too_long = False
        try:
            # A guest that was present before this worker does not say hello again by itself, so it is asked to.
            self._send({"op": "hello"})
            while piece := await reader.read(MAX_LINE_BYTES):
                *ends, rest = piece.split(b"\n")
                for end in ends:
                    line += end
                    if is_too_long or len(line) >= MAX_LINE_BYTES:
                        self._refuse(None, f"a line must have at most {MAX_LINE_BYTES} bytes")
                    elif line.strip():
                        self._received(bytes(line))
                    line.clear()
                    is_too_long = False
                    await writer.drain()
                line += rest
                if len(line) >= MAX_LINE_BYTES:
                    line.clear()
                    is_too_long = True
        finally:
            self._gone()
            self._writer = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _gone(self) -> None:
        self._is_present = False
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_result(False)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        self._writer.write(text.encode(errors="replace") + b"\n")

    def _refuse(self, number: object, why: str) -> None:
        self._send({"id": number if isinstance(number, int) else None, "ok": False, "error": why})

    def _received(self, line: bytes) -> None:
        number: object = None
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise InvalidSpec("a message must be a JSON object")
            number = message.get("id")
            if number is not None and (type(number) is not int or not 0 <= number < 1 << 53):
                raise InvalidSpec("an id must be a whole number below 2^53")
            self._obey(message, number)
        except VmmError as error:
            self._refuse(number, error.problem)
        except (ValueError, RecursionError):
            self._refuse(number, "this is not JSON")

    def _obey(self, message: dict[str, Any], number: int | None) -> None:
        operation = message.get("op")
        if operation is None and "ok" in message:
            answered = self._waiting.get(number) if number is not None else None
            if answered is not None and not answered.done():
                answered.set_result(message["ok"] is True)
        elif operation == "hello":
            self._is_present = True
            for key, value in self._store.items("host").items():
                self._number += 1
                self._send({"id": self._number, "op": "set", "key": key, "value": value})
        elif operation == "get":
            value = self._store.get(_pool_of(message), _word(message, "key"))
            self._send({"id": number, "ok": True, "value": value})
        elif operation == "list":
            items = self._store.items(_pool_of(message))
            for key, value in items.items():
                self._send({"id": number, "key": key, "value": value})
            self._send({"id": number, "ok": True, "count": len(items)})
        elif operation in ("set", "delete"):
            if _pool_of(message, "guest") != "guest":
                raise InvalidSpec("the guest cannot change the host's items")
            if operation == "set":
                self._store.set("guest", _word(message, "key"), _word(message, "value"))
            else:
                self._store.delete("guest", _word(message, "key"))
            self._save_soon()
            self._send({"id": number, "ok": True})
        else:
            raise InvalidSpec("op must be hello, get, list, set or delete")

    def _save_soon(self) -> None:
        async def save() -> None:
            await asyncio.sleep(SAVE_SECONDS)  # one write for all changes that follow soon
            self._saving = None
            with contextlib.suppress(VmmError):  # a full disk: the item is in memory, and saved with the next change
                self._store.save(durable=False)

        if self._saving is None:
            self._saving = asyncio.create_task(save())


def _pool_of(message: dict[str, Any], default: Pool = "host") -> Pool:
    pool = message.get("pool", default)
    if pool not in POOLS:
        raise InvalidSpec('pool must be "host" or "guest"')
    return "guest" if pool == "guest" else "host"


def _word(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise InvalidSpec(f"{name} must be a string")
    return value


def pool_named(name: str | None) -> Pool | None:
    """The pool with that name; None for None. Raises InvalidSpec."""
    for pool in POOLS:
        if pool == name:
            return pool
    if name is not None:
        raise InvalidSpec(f"unknown pool {name!r}; the pools are {' and '.join(POOLS)}")
    return None


def find_item(get: Callable[[Pool, str], str], key: str, pool: Pool | None) -> ExchangedItem:
    """The item with that key: in `pool`, or else first in the guest's, then in the host's. Raises NotFound."""
    pools: tuple[Pool, ...] = ("guest", "host") if pool is None else (pool,)
    for one in pools:
        try:
            return ExchangedItem(get(one, key), one)
        except NotFound:
            continue
    raise NotFound(f"item {key!r} does not exist", hint="vmm kvp list shows all items")


def store_path(machine_folder: str) -> str:
    """The file with a machine's exchanged items."""
    return os.path.join(machine_folder, "exchange.json")
