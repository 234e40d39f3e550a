# SPDX-License-Identifier: Apache-2.0
"""The guest agent: services and their switches, time-outs, malformed answers, and that a guest never stays frozen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import require_linux_guest, require_qemu
from tests.vmm.guests import launch, linux
from tests.vmm.guests.shell import GuestShell
from tests.waiting import until
from vmm.kvm import guest_agent
from vmm.kvm.guest_agent import GuestAgent
from vmm.model.errors import AgentUnavailable, TimedOut, VmmError
from vmm.model.spec import IntegrationSpec

Answer = Callable[[str, dict[str, Any]], Any]


class FakeGuest:
    """The other end of the port: answers a command with what `answers` has for it; None means no answer."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4096):
                request = json.loads(piece)  # one request at a time, and no further line after it
                command, arguments = request["execute"], request.get("arguments", {})
                self.asked.append(command)
                answer = arguments["id"] if command == "guest-sync" else self.answers.get(command)
                if callable(answer):
                    answer = answer(arguments)
                if isinstance(answer, str) and answer.startswith("error: "):
                    reply = {"error": {"class": "GenericError", "desc": answer}, "id": request["id"]}
                elif answer is None:
                    continue
                else:
                    reply = {"return": answer, "id": request["id"]}
                writer.write(json.dumps(reply).encode() + b"\n")
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def agent_of(
    folder: Path, answers: dict[str, Any], **switches: bool
) -> AsyncIterator[tuple[GuestAgent, FakeGuest]]:
    """A GuestAgent whose guest has opened its port."""
    fake = FakeGuest(answers)
    server = await asyncio.start_unix_server(fake.serve, folder / "agent.sock")
    agent = GuestAgent(str(folder / "agent.sock"), IntegrationSpec(**switches), machine="web")
    agent.port_changed(True)
    try:
        yield agent, fake
    finally:
        await agent.close()
        server.close()


def test_a_guest_without_an_agent(tmp_path: Path) -> None:
    """Before the guest has opened its port, every request fails at once and says what to install."""

    async def scene() -> None:
        agent = GuestAgent(str(tmp_path / "agent.sock"), IntegrationSpec(), machine="web")
        assert agent.heartbeat().state == "no contact"
        with pytest.raises(AgentUnavailable, match=r"web: no guest agent.*qemu-guest-agent"):
            await agent.os_info()
        assert (await agent.summary()).os is None

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("service", "ask"),
    [
        ("shutdown", lambda agent: agent.shutdown()),
        ("time_sync", lambda agent: agent.set_time()),
        ("key_value", lambda agent: agent.os_info()),
        ("key_value", lambda agent: agent.addresses()),
        ("backup", lambda agent: agent.freeze()),
        ("heartbeat", lambda agent: agent.ping()),
    ],
)
def test_a_service_that_is_off_is_refused(tmp_path: Path, service: str, ask: Callable[[GuestAgent], Any]) -> None:
    """The error names the service, and no request reaches the guest."""

    async def scene() -> None:
        async with agent_of(tmp_path, {}, **{service: False}) as (agent, fake):
            with pytest.raises(AgentUnavailable, match=service.replace("_", "-")):
                await ask(agent)
            assert fake.asked == []

    asyncio.run(scene())


def test_malformed_answers(tmp_path: Path) -> None:
    """Answers of any shape become bounded texts, never an error of Python's."""
    addresses = [{"ip-address": "10.0.0.5", "prefix": 24}, {"ip-address": "x" * 999, "prefix": "no"}, 7, {}] * 20
    interfaces = [{"name": "eth0", "hardware-address": 5, "ip-addresses": addresses}, 1, {"name": ["a"]}] * 99
    answers: dict[str, Any] = {
        "guest-get-osinfo": {"name": ["not", "a", "text"], "pretty-name": "Linux" * 999, "kernel-release": 6},
        "guest-get-host-name": [1, 2],
        "guest-network-get-interfaces": interfaces,
    }

    async def scene() -> None:
        async with agent_of(tmp_path, answers) as (agent, _):
            info = await agent.os_info()
            assert info.name == ("Linux" * 999)[: guest_agent.MAX_TEXT_CHARACTERS]
            assert (info.kernel, info.host_name) == ("", "")
            found = await agent.addresses()
            assert 0 < len(found) <= guest_agent.MAX_INTERFACES
            assert found[0].addresses[0] == "10.0.0.5/24" and found[0].mac == ""
            assert len(found[0].addresses) <= guest_agent.MAX_ADDRESSES
            answers["guest-network-get-interfaces"] = {"no": "list"}
            assert await agent.addresses() == ()

    asyncio.run(scene())


def test_a_line_without_an_end_is_cut_off(tmp_path: Path) -> None:
    """A guest that sends without end is disconnected, and can be asked again later."""

    async def scene() -> None:
        async with agent_of(tmp_path, {"guest-ping": "x" * (12 << 20)}) as (agent, fake):
            with pytest.raises(AgentUnavailable, match="web"):
                await agent.ping()
            fake.answers["guest-ping"] = {}
            await agent.ping()

    asyncio.run(scene())


def test_a_silent_guest_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that does not answer is a TimedOut with the machine's name; the next request succeeds."""
    monkeypatch.setattr(guest_agent, "ANSWER_SECONDS", 0.2)
    ask_kwdefaults = GuestAgent._ask.__kwdefaults__
    assert ask_kwdefaults is not None
    monkeypatch.setitem(ask_kwdefaults, "seconds", 0.2)

    async def scene() -> None:
        async with agent_of(tmp_path, {}) as (agent, fake):
            with pytest.raises(TimedOut, match="web"):
                await agent.ping()
            fake.answers["guest-ping"] = {}
            await agent.ping()
            assert agent.heartbeat().state == "ok"
            agent.port_changed(False)
            assert agent.heartbeat().state == "lost"

    asyncio.run(scene())


def test_shutdown_does_not_need_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that obeys does not answer, which counts as success; a refusal is reported."""
    monkeypatch.setattr(guest_agent, "SHUTDOWN_ANSWER_SECONDS", 0.2)

    async def scene() -> None:
        async with agent_of(tmp_path, {}) as (agent, fake):
            await agent.shutdown()
            assert fake.asked[-1] == "guest-shutdown"
            fake.answers["guest-shutdown"] = "error: not today"
            with pytest.raises(AgentUnavailable, match="not today"):
                await agent.shutdown()

    asyncio.run(scene())


class FreezingGuest(dict[str, Any]):
    """Answers of a guest that can be frozen, and whether it is."""

    def __init__(self) -> None:
        super().__init__()
        self.is_frozen = False
        self["guest-ping"] = {}
        self["guest-fsfreeze-freeze"] = lambda _: self._set(True)
        self["guest-fsfreeze-thaw"] = lambda _: self._set(False)
        self["guest-fsfreeze-status"] = lambda _: "frozen" if self.is_frozen else "thawed"

    def _set(self, is_frozen: bool) -> int:
        self.is_frozen = is_frozen
        return 2


def test_leaving_the_block_always_thaws(tmp_path: Path) -> None:
    """Inside the block the guest is frozen; after it, even after an error in it, it is not."""
    guest = FreezingGuest()

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):
            async with agent.frozen() as count:
                assert count == 2 and guest.is_frozen and await agent.is_frozen()
                with pytest.raises(AgentUnavailable, match="already"):
                    await agent.freeze()
            assert not guest.is_frozen
            with pytest.raises(ZeroDivisionError):
                async with agent.frozen():
                    raise ZeroDivisionError
            assert not guest.is_frozen

    asyncio.run(scene())


def test_a_freeze_that_lasts_too_long_is_an_error(tmp_path: Path) -> None:
    """When the time is over the guest is thawed although the block still runs, and leaving the block raises an
    error."""
    guest = FreezingGuest()

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):
            with pytest.raises(TimedOut, match="before the work was done"):
                async with agent.frozen(max_seconds=0.05):
                    await until(lambda: not guest.is_frozen, "the guest thaws")
            async with agent.frozen():  # and it can be frozen again
                pass

    asyncio.run(scene())


def test_cancelling_and_closing_thaw(tmp_path: Path) -> None:
    """A cancelled block and a closed agent leave nothing frozen."""
    guest = FreezingGuest()

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):

            async def work() -> None:
                async with agent.frozen():
                    await asyncio.sleep(60)  # until it is cancelled

            task = asyncio.create_task(work())
            await until(lambda: guest.is_frozen, "the guest freezes")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not guest.is_frozen
            await agent.freeze()
            await agent.close()
            assert not guest.is_frozen

    asyncio.run(scene())


def test_a_late_freeze_is_thawed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that freezes after we gave up waiting is thawed all the same."""
    monkeypatch.setattr(guest_agent, "FREEZE_ANSWER_SECONDS", 0.1)
    guest = FreezingGuest()

    def freeze_without_a_word(_: object) -> None:
        guest.is_frozen = True

    guest["guest-fsfreeze-freeze"] = freeze_without_a_word

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):
            with pytest.raises(TimedOut):
                await agent.freeze()
            assert not guest.is_frozen

    asyncio.run(scene())


class QueueingGuest:
    """An agent that can be stopped for a while: it carries out later, in order, what it was asked in the meantime."""

    def __init__(self) -> None:
        self.is_frozen = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.done: list[str] = []
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.StreamWriter]] = asyncio.Queue()
        self._working: asyncio.Task[None] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4096):
                self._queue.put_nowait((json.loads(piece), writer))
        writer.close()

    async def _work(self) -> None:
        while True:
            request, writer = await self._queue.get()
            await self.goes_on.wait()
            command = request["execute"]
            self.done.append(command)
            answer: Any = request.get("arguments", {}).get("id", {})
            if command in ("guest-fsfreeze-freeze", "guest-fsfreeze-thaw"):
                self.is_frozen, answer = command.endswith("freeze"), 1
            elif command == "guest-fsfreeze-status":
                answer = "frozen" if self.is_frozen else "thawed"
            with contextlib.suppress(ConnectionError):
                writer.write(json.dumps({"return": answer, "id": request["id"]}).encode() + b"\n")
                await writer.drain()
            if command == "guest-ping" and self.stops_after_ping:
                self.goes_on.clear()

    stops_after_ping = False


def test_a_freeze_whose_time_is_over_is_reported_once(tmp_path: Path) -> None:
    """INV-THAWED: a caller that thaws after the time was over gets one error for that, and can freeze again."""
    guest = FreezingGuest()

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):
            for _ in range(2):
                await agent.freeze(max_seconds=0.02)
                await until(lambda: not guest.is_frozen, "the guest thaws")
            with pytest.raises(TimedOut, match="before the work was done"):
                await agent.thaw()
            assert await agent.thaw() == 2
            with pytest.raises(TimedOut, match="before the work was done"):
                async with agent.frozen():
                    await agent.thaw()  # with another command
                    await agent.freeze()
            assert guest.is_frozen  # for that one
            assert await agent.thaw() == 2
            again = GuestAgent(str(tmp_path / "agent.sock"), IntegrationSpec(), is_owed=True)
            again.port_changed(True)
            with pytest.raises(TimedOut, match="the worker died"):
                await again.thaw()
            await again.close()

    asyncio.run(scene())


def test_an_agent_that_is_silent_at_the_end_of_a_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-THAWED: such a guest is thawed when its agent is back, although no caller waits for that."""
    for name in ("THAW_TRY_SECONDS", "THAW_AGAIN_SECONDS", "THAW_GIVE_UP_SECONDS"):
        monkeypatch.setattr(guest_agent, name, 0.05)
    guest = FreezingGuest()
    thaw = guest.pop("guest-fsfreeze-thaw")
    guest["guest-fsfreeze-thaw"] = None

    async def scene() -> None:
        async with agent_of(tmp_path, guest, heartbeat=False, key_value=False) as (agent, fake):
            await agent.freeze(max_seconds=0.02)
            running = asyncio.create_task(agent.run())
            # The timer gives up first.
            await until(lambda: fake.asked.count("guest-fsfreeze-thaw") >= 5, "it is asked to thaw again and again")
            guest["guest-fsfreeze-thaw"] = thaw
            await until(lambda: not guest.is_frozen, "the guest thaws")
            running.cancel()

    asyncio.run(scene())


@pytest.mark.parametrize("same_worker", [True, False], ids=["the worker", "the next worker"])
def test_an_agent_that_freezes_long_after_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_worker: bool
) -> None:
    """INV-THAWED: an agent that was stopped when it should freeze, and does so after all callers gave up, is
    thawed."""
    monkeypatch.setattr(guest_agent, "FREEZE_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(guest_agent, "THAW_TRY_SECONDS", 0.1)
    monkeypatch.setattr(guest_agent, "THAW_AGAIN_SECONDS", 0.02)
    notes: list[bool] = []
    events: list[str] = []

    async def scene() -> None:
        guest = QueueingGuest()
        server = await asyncio.start_unix_server(guest.serve, tmp_path / "agent.sock")

        def agent_now(*, is_owed: bool) -> GuestAgent:
            agent = GuestAgent(
                str(tmp_path / "agent.sock"), IntegrationSpec(heartbeat=False, key_value=False), owes=notes.append,
                is_owed=is_owed, tell=lambda event, **details: events.append(event),
            )  # fmt: skip
            agent.port_changed(True)
            return agent

        agent = agent_now(is_owed=False)
        running = asyncio.create_task(agent.run())
        guest.stops_after_ping = True
        with pytest.raises(TimedOut, match=r"guest-fsfreeze-freeze within 0\.1 s"):
            await agent.freeze()
        assert notes == [True] and "guest-fsfreeze-freeze" not in guest.done
        guest.stops_after_ping = False
        if not same_worker:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await agent.close()
            agent = agent_now(is_owed=notes[-1])
            running = asyncio.create_task(agent.run())
            await asyncio.sleep(0.3)  # it first finds a silent guest
        assert events == []
        guest.goes_on.set()
        await until(lambda: not notes[-1] and not guest.is_frozen, "the guest is thawed, and no thaw is pending")
        assert "guest-fsfreeze-freeze" in guest.done
        assert (events, notes) == (["guest-thawed"], [True, False]), guest.done
        running.cancel()
        await agent.close()
        server.close()

    asyncio.run(scene())


def test_a_silent_agent_is_not_asked_to_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-THAWED: an agent that does not answer a ping gets no freeze request that it could carry out later."""
    ask_kwdefaults = GuestAgent._ask.__kwdefaults__
    assert ask_kwdefaults is not None
    monkeypatch.setitem(ask_kwdefaults, "seconds", 0.1)

    async def scene() -> None:
        async with agent_of(tmp_path, {}) as (agent, fake):
            began = time.monotonic()
            with pytest.raises(TimedOut, match="guest-ping"):
                await agent.freeze()
            assert time.monotonic() - began < guest_agent.FREEZE_ANSWER_SECONDS
            assert "guest-fsfreeze-freeze" not in fake.asked

    asyncio.run(scene())


def test_a_request_keeps_to_its_deadline(tmp_path: Path) -> None:
    """Connecting, synchronising and the answer share one deadline, so a freeze does not take three times as long."""

    async def scene() -> None:
        async with agent_of(tmp_path, {}) as (agent, fake):
            slow = fake.serve

            async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await asyncio.sleep(0.6)  # most of the time that the request may take
                await slow(reader, writer)

            server = await asyncio.start_unix_server(late, tmp_path / "late.sock")
            agent._path = str(tmp_path / "late.sock")
            began = asyncio.get_running_loop().time()
            with pytest.raises(TimedOut, match="within 1 s"):
                await agent._ask("guest-ping", seconds=1.0)
            assert asyncio.get_running_loop().time() - began < 1.5
            server.close()

    asyncio.run(scene())


def test_a_new_worker_thaws_a_frozen_guest(tmp_path: Path) -> None:
    """A guest that an earlier worker left frozen is thawed at the first contact."""
    guest = FreezingGuest()
    guest.is_frozen = True

    async def scene() -> None:
        async with agent_of(tmp_path, guest) as (agent, _):
            running = asyncio.create_task(agent.run())
            await until(lambda: not guest.is_frozen, "the guest thaws")
            running.cancel()

    asyncio.run(scene())


async def thawed_when_it_goes_on(path: str, shell: GuestShell, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-THAWED: an agent that is stopped between its ping and the freeze, and continues after all callers gave
    up."""
    agent = GuestAgent(path, IntegrationSpec(heartbeat=False, key_value=False))
    agent.port_changed(True)
    ask = agent._ask

    async def and_stop(command: str, *, seconds: float = 3.0, **arguments: object) -> Any:
        answer = await ask(command, seconds=seconds, **arguments)
        if command == "guest-ping":
            await asyncio.to_thread(shell.check, "kill -STOP $(pidof qemu-ga)")
        return answer

    monkeypatch.setattr(guest_agent, "FREEZE_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(agent, "_ask", and_stop)
    running = asyncio.create_task(agent.run())
    with pytest.raises(TimedOut, match="guest-fsfreeze-freeze"):
        await agent.freeze()
    assert agent._is_owed
    await asyncio.to_thread(shell.check, "kill -CONT $(pidof qemu-ga)")
    await until(lambda: not agent._is_owed, "the guest thaws")
    assert not await agent.is_frozen()
    running.cancel()
    await agent.close()


@pytest.mark.kvm
def test_real_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's own agent in a Linux guest: system, addresses, time, a freeze that stops writes, shutdown."""
    built = require_linux_guest()
    words = [
        "-kernel", str(built.kernel), "-initrd", str(built.initrd), "-append", built.append,
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=ga,path={tmp_path}/ga.sock,server=on,wait=off",
        "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0,id=agent",
        "-nic", "user,model=virtio-net-pci,mac=00:15:5d:00:00:07", "-rtc", "base=2020-01-01T00:00:00",
    ]  # fmt: skip
    (tmp_path / "disk.raw").write_bytes(bytes(16 << 20))
    words += launch.drive(tmp_path / "disk.raw", "virtio")
    with (
        launch.running(require_qemu(), tmp_path, *words, memory=linux.MEMORY) as guest,
        GuestShell(guest.serial) as shell,
    ):
        shell.wait_ready()
        shell.check("ip link set eth0 up && ip addr add 10.9.8.7/24 dev eth0")
        shell.check("mke2fs -F /dev/vda 2>&1 && mount -t ext4 /dev/vda /mnt && echo old >/mnt/file")

        async def scene() -> None:
            agent = GuestAgent(str(tmp_path / "ga.sock"), IntegrationSpec(), machine="web")
            agent.port_changed(True)
            info = await agent.os_info()
            assert info.name == "vmm test guest" and info.kernel and info.host_name == "vmm-guest"
            (interface,) = await agent.addresses()
            assert (interface.name, interface.mac) == ("eth0", "00:15:5d:00:00:07")
            assert "10.9.8.7/24" in interface.addresses
            await agent.set_time()
            async with agent.frozen() as count:
                assert count >= 1
                # The write waits for the thaw, in the background of the guest.
                shell.send("(echo new >/mnt/file; sync; echo done >/run/done) &")
                assert shell.run("sleep 0.5; cat /run/done").exit_code != 0
            await agent.close()

        asyncio.run(scene())
        asyncio.run(thawed_when_it_goes_on(str(tmp_path / "ga.sock"), shell, monkeypatch))
        shell.check("echo later >/mnt/file && sync")
        assert abs(int(shell.check("date +%s")) - time.time()) < 30
        shell.check("for i in $(seq 100); do [ -e /run/done ] && exit 0; usleep 100000; done; exit 1")

        async def end() -> None:
            agent = GuestAgent(str(tmp_path / "ga.sock"), IntegrationSpec())
            agent.port_changed(True)
            await agent.shutdown()
            with contextlib.suppress(VmmError):
                await agent.close()

        asyncio.run(end())
        assert guest.wait() == 0
