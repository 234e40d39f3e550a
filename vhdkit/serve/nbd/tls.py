# SPDX-License-Identifier: Apache-2.0
"""TLS for the server: which files it needs, and which clients it admits.

Decides the names of the files, which are those of QEMU, nbdkit and libnbd, and which clients are admitted:

    ca-cert.pem exists          ->  a client must present a certificate signed by this CA
    ca-cert.pem does not exist  ->  any client; the connection is encrypted, and the server presents its certificate
    ca-crl.pem exists, too      ->  the client's certificate must not be on this list

TLS 1.2 is the minimum. Sockets are handled in `channel`.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

from vhdkit import errors
from vhdkit.errors import quoted
from vhdkit.folder import exists, read_whole
from vhdkit.store import translate
from vhdkit.units import MIB

CERTIFICATE, KEY, AUTHORITY, REVOKED = "server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"
_MAX_KEYS_BYTES = MIB
_MIN_PSK_HEX = 32


def certificate_context(directory: str) -> ssl.SSLContext:
    """A context from a folder with certificate and key. Raises NotFound, AccessDenied, InvalidArgument, each naming
    the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # with renegotiation, a send might have to wait for the client's bytes
    certificate, key, authority, revoked = (
        os.path.join(directory, name) for name in (CERTIFICATE, KEY, AUTHORITY, REVOKED)
    )
    for path in (certificate, key):
        if not exists(path):
            raise errors.NotFound(
                "does not exist; a server needs its certificate and its key",
                path=path,
                hint=f"make them with openssl or certtool as {CERTIFICATE} and {KEY} in {quoted(directory)}",
            )
    _load(certificate, lambda: context.load_cert_chain(certificate, key, password=_no_password))
    if exists(authority):
        _load(authority, lambda: context.load_verify_locations(authority))
        context.verify_mode = ssl.CERT_REQUIRED
        if exists(revoked):
            _load(revoked, lambda: context.load_verify_locations(revoked))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _no_password() -> str:
    raise ValueError("the key is protected by a password")


def _load(path: str, load: Any) -> None:
    """Let the library read its files, and name the one it could not use."""
    try:
        load()
    except ssl.SSLError as error:
        raise errors.InvalidArgument(f"cannot be used for TLS: {error.reason or error}", path=path) from error
    except ValueError as error:
        raise errors.InvalidArgument(f"cannot be used for TLS: {error}", path=path) from error
    except OSError as error:
        raise translate(error, path, "read it, or the key that belongs to it") from error


def psk_context(path: str) -> ssl.SSLContext:
    """A context from a file of lines USER:KEY, the key in hexadecimal digits, as written by `psktool`.

    Raises NotFound, and InvalidArgument, also if this Python's ssl module does not support pre-shared keys.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    set_callback = getattr(context, "set_psk_server_callback", None)
    if set_callback is None:
        raise errors.InvalidArgument(
            "pre-shared keys need Python 3.13 or newer",
            hint="use certificates (--tls-certs), or --engine nbdkit",
        )
    keys = read_keys(path)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2  # the module's callback is for TLS 1.2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("PSK")
    set_callback(lambda identity: keys.get(identity or "", b""))
    return context


def read_keys(path: str) -> dict[str, bytes]:
    """User and key of every line. Raises NotFound, and InvalidArgument with the number of an invalid line."""
    raw = read_whole(path, _MAX_KEYS_BYTES)
    if raw is None:
        if not exists(path):
            raise errors.NotFound("no such file of keys", path=path)
        raise errors.InvalidArgument(
            f"is not a file of keys: not a regular file of at most {_MAX_KEYS_BYTES} bytes", path=path
        )
    keys: dict[str, bytes] = {}
    for number, line in enumerate(raw.decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not user or len(digits) < _MIN_PSK_HEX or not key:
            raise errors.InvalidArgument(
                f"line {number} is not USER:KEY with at least {_MIN_PSK_HEX} hexadecimal digits", path=path
            )
        keys[user] = key
    if not keys:
        raise errors.InvalidArgument("holds no keys", path=path)
    return keys
