# SPDX-License-Identifier: Apache-2.0
"""The worker's methods for the inside of its machine: its screen, its agent, the key-value exchange.

Decides the names, parameters and results of these methods of the control socket; what they do is decided in
`kvm.guest_agent`, `kvm.key_value` and `kvm.screen`. Results are JSON; a picture is encoded in base64.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from vmm.kvm import screen
from vmm.kvm.key_value import POOLS, find_item, pool_named
from vmm.kvm.picture import packed
from vmm.model.errors import InvalidSpec, WrongState
from vmm.model.guest import GuestInfo
from vmm.processes.rpc import Method, Progress, parameter

if TYPE_CHECKING:
    from vmm.worker.running import Running

MAX_FREEZE_SECONDS: Final = 300.0


class GuestServices:
    """The methods, for one running machine."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._one_picture = asyncio.Lock()

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket, by name."""
        return {
            "screen": self._screen,
            "agent-ping": self._ping,
            "agent-info": self._info,
            "agent-freeze": self._freeze,
            "agent-thaw": self._thaw,
            "agent-set-time": self._set_time,
            "kvp-list": self._list,
            "kvp-get": self._get,
            "kvp-set": self._set,
            "kvp-delete": self._delete,
        }

    async def _screen(self, params: dict[str, Any], progress: Progress) -> object:
        """{"points": BOOL}: {"png": base64}, or {"ppm": packed}. Raises WrongState for a machine without a screen."""
        as_points = parameter(params, "points", bool, False)
        if not self._running.spec.screen:
            raise WrongState("has no screen", hint=f"vmm set {self._running.spec.name} --screen, while it is off")
        async with self._one_picture:
            picture = await (screen.pixmap if as_points else screen.screendump)(self._running.qmp)
        if as_points:
            return {"ppm": packed(picture)}
        return {"png": base64.b64encode(picture).decode()}

    # -- the agent --------------------------------------------------------------------------------------------------

    async def _ping(self, params: dict[str, Any], progress: Progress) -> object:
        """The heartbeat, after querying the agent."""
        await self._running.agent.ping()
        return asdict(self._running.agent.heartbeat())

    async def _info(self, params: dict[str, Any], progress: Progress) -> object:
        """Heartbeat, system and addresses, queried now. Raises AgentUnavailable if the agent does not answer."""
        agent = self._running.agent
        info = await agent.os_info()
        interfaces = await agent.addresses()
        beat = agent.heartbeat()
        return asdict(GuestInfo(beat.state, beat.seen_seconds_ago, info, interfaces))

    async def _freeze(self, params: dict[str, Any], progress: Progress) -> object:
        """{"max_seconds": S}: {"count": file systems}; they thaw by themselves after S seconds."""
        seconds = parameter(params, "max_seconds", int | float, 10.0)
        if not 0 < seconds <= MAX_FREEZE_SECONDS:
            raise InvalidSpec(f"file systems stay frozen for at most {MAX_FREEZE_SECONDS:g} seconds")
        return {"count": await self._running.agent.freeze(max_seconds=seconds), "max_seconds": seconds}

    async def _thaw(self, params: dict[str, Any], progress: Progress) -> object:
        """{"count": file systems}."""
        return {"count": await self._running.agent.thaw()}

    async def _set_time(self, params: dict[str, Any], progress: Progress) -> object:
        """Set the guest's clock to the host's."""
        await self._running.agent.set_time()
        return {}

    # -- the exchange -----------------------------------------------------------------------------------------------

    async def _list(self, params: dict[str, Any], progress: Progress) -> object:
        """{"items": {pool: {key: value}}, "present": whether a program in the guest takes part}."""
        exchange = self._running.exchange
        return {"items": {pool: exchange.items(pool) for pool in POOLS}, "present": exchange.is_present}

    async def _get(self, params: dict[str, Any], progress: Progress) -> object:
        """{"key": K, "pool": P or none for the guest's, then the host's}: {"value": V, "pool": P}."""
        key, pool = _key(params), pool_named(parameter(params, "pool", str))
        return asdict(find_item(self._running.exchange.get, key, pool))

    async def _set(self, params: dict[str, Any], progress: Progress) -> object:
        """{"key": K, "value": V}: {"taken": whether the guest has received it}."""
        return {"taken": await self._running.exchange.set(_key(params), parameter(params, "value", str, ""))}

    async def _delete(self, params: dict[str, Any], progress: Progress) -> object:
        """{"key": K}: {"taken": whether the guest has received the deletion}."""
        return {"taken": await self._running.exchange.delete(_key(params))}


def _key(params: dict[str, Any]) -> str:
    return str(parameter(params, "key", str, ""))
