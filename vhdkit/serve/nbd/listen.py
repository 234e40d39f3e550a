# SPDX-License-Identifier: Apache-2.0
"""Where the server listens: Unix sockets, TCP, and sockets passed by a service manager; and their URIs.

Decides what an address on the command line means, and where listening without TLS is refused. How a socket gets its
file is decided in `sockets`, what happens to clients in `nbd.server`.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import ipaddress
import os
import pwd
import socket
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote

from vhdkit import errors
from vhdkit.sockets import PrivateFolder, SocketFile
from vhdkit.store import translate

DEFAULT_PORT = 10809  # assigned to NBD by IANA
_FIRST_ACTIVATED_FD = 3  # systemd's convention
_MAX_ACTIVATED = 64
_MAX_PORT = 0xFFFF
_NO_SUCH_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_ANY_HOSTS = frozenset({"", "*", "0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class Address:
    """Where a client finds the server: `path`, or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    def uri(self, export_name: str, *, secure: bool = False) -> str:
        """The NBD URI of an export at this address."""
        scheme = "nbds" if secure else "nbd"
        name = quote(export_name, safe="")
        if self.path:
            return f"{scheme}+unix:///{name}?socket={quote(os.path.abspath(self.path))}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{name}"


class Listeners:
    """The sockets of one server. `close` removes the socket files made here."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.addresses: list[Address] = []
        self._made = contextlib.ExitStack()

    def add_unix(self, path: str | None, *, owner: tuple[int, int | None] | None = None) -> None:
        """Listen on a Unix socket, in a private folder if no path is given. Raises as `SocketFile` does."""
        if path is None:
            folder = PrivateFolder(owner=owner)
            self._made.callback(folder.close)
            path = os.path.join(folder.path, "nbd.sock")
        file = SocketFile(path, owner=owner)
        self._made.callback(file.close)
        self._add(file.socket, Address(path=path))

    def add_tcp(self, host: str, port: int, *, open_to_all: bool) -> None:
        """Listen on every address of `host`; port 0 means any free port, the same for all addresses.

        Non-loopback addresses only with `open_to_all`. Raises InvalidArgument, AddressInUse, NotFound.
        """
        place = f"{host}:{port}"
        resolved = _resolved(host, port, place)
        if not open_to_all and not all(_is_loopback(address) for _, address in resolved):
            raise errors.InvalidArgument(
                f"{place} can be reached from other machines without encryption",
                hint="add --tls-certs and --tls-required, or --insecure if you trust every machine on that network",
            )
        bound = 0
        for family, address in resolved:
            try:
                sock = _bound(family, address, port)
            except OSError as error:
                if error.errno in _NO_SUCH_ADDRESS and (bound or (family, address) != resolved[-1]):
                    continue  # a machine without IPv6 still resolves ::1
                if error.errno == errno.EADDRINUSE:
                    raise errors.AddressInUse(f"another program is listening on {place}") from error
                raise translate(error, place, "listen") from error
            self._made.callback(sock.close)
            self.sockets.append(sock)
            port, bound = int(sock.getsockname()[1]), bound + 1
        self.addresses.append(Address(host="localhost" if host in _ANY_HOSTS else host, port=port))

    def add_activated(self) -> bool:
        """Take over the sockets passed by the service manager; False if there are none. Raises InvalidArgument."""
        for number in range(_activated_count()):
            fd = _FIRST_ACTIVATED_FD + number
            try:
                sock = socket.socket(fileno=fd)
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as error:
                raise errors.InvalidArgument(f"LISTEN_FDS: descriptor {fd} is not a socket") from error
            if not listens or sock.type != socket.SOCK_STREAM:
                raise errors.InvalidArgument(f"LISTEN_FDS: descriptor {fd} is not a listening stream socket")
            sock.set_inheritable(False)
            self._made.callback(sock.close)
            self._add(sock, _address_of(sock))
        return bool(self.sockets)

    def _add(self, sock: socket.socket, address: Address) -> None:
        self.sockets.append(sock)
        self.addresses.append(address)

    def close(self) -> None:
        """Close all sockets and remove the socket files made here. Closing twice is fine."""
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def is_activated() -> bool:
    """True if the service manager passed sockets to this process."""
    return _listen_fds() > 0


def _listen_fds() -> int:
    """The count in LISTEN_FDS, if LISTEN_PID shows that it is meant for this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    text = os.environ.get("LISTEN_FDS", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def _activated_count() -> int:
    count = _listen_fds()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # programs that we start must not take the sockets for theirs
    if count > _MAX_ACTIVATED:
        raise errors.InvalidArgument(f"LISTEN_FDS={count} is too many: at most {_MAX_ACTIVATED} sockets are taken")
    return count


def _address_of(sock: socket.socket) -> Address:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address(path=os.fsdecode(name))
    return Address(host=str(name[0]), port=int(name[1]))


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT, :PORT or HOST as (host, port). Raises ValueError for any other text."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not host or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not [IPV6]:PORT")
        port = rest[1:]
    elif text.count(":") > 1:
        raise ValueError(f"put an IPv6 address in brackets: [{text}]:{DEFAULT_PORT}")
    else:
        host, _, port = text.partition(":")
    if not port and not text.endswith(":"):
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdecimal() and int(port) <= _MAX_PORT):
        raise ValueError(f"{port!r} is not a port number (0 to {_MAX_PORT})")
    return host, int(port)


def parse_owner(text: str) -> tuple[int, int | None]:
    """USER or USER:GROUP, names or numbers, as ids. Raises ValueError if one does not exist."""
    user, colon, group = text.partition(":")
    try:
        user_id = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise ValueError(f"unknown user {user!r}") from error
    if not colon:
        return user_id, None
    try:
        return user_id, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ValueError(f"unknown group {group!r}") from error


def _resolved(host: str, port: int, place: str) -> list[tuple[socket.AddressFamily, str]]:
    """(family, address) of every address of the host, in the system's order."""
    try:
        found = socket.getaddrinfo(
            None if host in ("", "*") else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "is not a host name"
        raise errors.NotFound(f"{place}: the host name cannot be resolved: {reason}") from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _bound(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(socket.getaddrinfo(address, port, family, socket.SOCK_STREAM)[0][4])
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock
