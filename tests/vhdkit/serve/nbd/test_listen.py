# SPDX-License-Identifier: Apache-2.0
"""Addresses, sockets and URIs."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from vhdkit import errors
from vhdkit.serve.nbd.listen import Address, Listeners, is_activated, parse_address, parse_owner


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:10", ("localhost", 10)),
        ("localhost", ("localhost", 10809)),
        (":0", ("", 0)),
        ("[::1]:7", ("::1", 7)),
        ("[::1]", ("::1", 10809)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    """HOST:PORT in its various spellings."""
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["::1", "::1:7", "[::1", "[]:1", "[::1]7", "host:", "host:x", "host:65536", "host:-1", "h:٣"]
)
def test_invalid_addresses(text: str) -> None:
    """Text that is not HOST:PORT is refused with an error that says so."""
    with pytest.raises(ValueError):
        parse_address(text)


def test_owners() -> None:
    """Users and groups by name and by number; unknown names are refused."""
    assert parse_owner("root") == (0, None)
    assert parse_owner("0:0") == (0, 0) == parse_owner("root:root")
    for text in ("no-such-user-x", "root:no-such-group-x", ""):
        with pytest.raises(ValueError):
            parse_owner(text)


def test_uris() -> None:
    """Names and paths are quoted, IPv6 addresses in brackets."""
    assert Address(path="/a b/ü.sock").uri("x y/z?") == "nbd+unix:///x%20y%2Fz%3F?socket=/a%20b/%C3%BC.sock"
    assert Address(host="::1", port=9).uri("", secure=True) == "nbds://[::1]:9/"


def test_private_unix_socket(tmp_path: Path) -> None:
    """The socket is private to its user whatever the umask, and so is the folder of one without a name."""
    before = os.umask(0)
    try:
        with Listeners() as listeners:
            listeners.add_unix(str(tmp_path / "a.sock"))
            listeners.add_unix(None)
            for address in listeners.addresses:
                assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600
            private = Path(listeners.addresses[1].path)
            assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert not private.parent.exists() and not list(tmp_path.iterdir())


def test_shared_with_a_group(tmp_path: Path) -> None:
    """With a group its members can connect, too, whatever the umask."""
    with Listeners() as listeners:
        listeners.add_unix(str(tmp_path / "a.sock"), owner=(os.getuid(), os.getgid()))
        assert stat.S_IMODE(os.stat(tmp_path / "a.sock").st_mode) == 0o660


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    """The socket of a killed server is replaced; a live server's socket, and any other file, is not."""
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listeners() as first:
        first.add_unix(str(path))
        with Listeners() as second, pytest.raises(errors.AddressInUse) as caught:
            second.add_unix(str(path))
        assert caught.value.exit_code == 5
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()
    path.write_text("precious")
    with Listeners() as third, pytest.raises(errors.AlreadyExists):
        third.add_unix(str(path))
    assert path.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    with Listeners() as fourth, pytest.raises(errors.AlreadyExists):
        fourth.add_unix(str(link))


def test_of_many_servers_at_once_one_gets_the_name(tmp_path: Path) -> None:
    """Of servers that start together over a stale socket one listens, the others are refused."""
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    made: list[Listeners] = []
    refused: list[errors.AddressInUse] = []

    def start() -> None:
        listeners = Listeners()
        try:
            listeners.add_unix(path)
            made.append(listeners)
        except errors.AddressInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    made[0].close()


def test_another_socket_under_the_name_stays(tmp_path: Path) -> None:
    """At the end a server removes only its own socket."""
    path = tmp_path / "a.sock"
    with Listeners() as listeners:
        listeners.add_unix(str(path))
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
    assert path.exists()
    other.close()


def test_bad_paths(tmp_path: Path) -> None:
    """A path too long for a socket, and a missing folder, are named."""
    with Listeners() as listeners:
        with pytest.raises(errors.InvalidArgument, match="at most 107 bytes"):
            listeners.add_unix(str(tmp_path / ("x" * 108)))
        with pytest.raises(errors.NotFound):
            listeners.add_unix(str(tmp_path / "nowhere" / "a.sock"))
    assert not listeners.sockets


def test_tcp() -> None:
    """Port 0 is replaced by a real port, one for all addresses of the host; a port in use is refused."""
    with Listeners() as listeners, Listeners() as others:
        listeners.add_tcp("localhost", 0, open_to_all=False)
        (address,) = listeners.addresses
        assert address.port and {sock.getsockname()[1] for sock in listeners.sockets} == {address.port}
        socket.create_connection(("127.0.0.1", address.port)).close()
        with pytest.raises(errors.AddressInUse):
            others.add_tcp("127.0.0.1", address.port, open_to_all=False)


def test_tcp_beyond_loopback_needs_an_option() -> None:
    """Without the option only loopback addresses are accepted; names that do not resolve are reported."""
    with Listeners() as listeners:
        for host in ("", "0.0.0.0", "::", "192.0.2.1"):
            with pytest.raises(errors.InvalidArgument, match="--insecure"):
                listeners.add_tcp(host, 0, open_to_all=False)
        assert not listeners.sockets
        listeners.add_tcp("", 0, open_to_all=True)
        assert listeners.addresses[0].host == "localhost"
        with pytest.raises(errors.NotFound):
            listeners.add_tcp("no-such-host.invalid", 0, open_to_all=True)
        with pytest.raises(errors.VhdkitError):
            listeners.add_tcp("192.0.2.1", 0, open_to_all=True)


def test_activation_is_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """LISTEN_FDS meant for another process, or without a number, is ignored."""
    for pid, count, expected in (("1", "1", False), (str(os.getpid()), "x", False), (str(os.getpid()), "0", False)):
        monkeypatch.setenv("LISTEN_PID", pid)
        monkeypatch.setenv("LISTEN_FDS", count)
        assert is_activated() is expected
        with Listeners() as listeners:
            assert not listeners.add_activated()
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1000000000000")
    with Listeners() as listeners, pytest.raises(errors.InvalidArgument):
        listeners.add_activated()
    assert "LISTEN_FDS" not in os.environ
