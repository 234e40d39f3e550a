# SPDX-License-Identifier: Apache-2.0
"""NBD on the wire: numbers, and messages as bytes.

Decides how a message is encoded, never when one is sent. Pure. Source: the NBD protocol document (doc/proto.md)
and its branch for extended headers; names are those of the document without the prefix.
"""

from __future__ import annotations

import errno as errnos
import struct
from enum import IntEnum, IntFlag

GREETING = struct.Struct(">8s8sH")
INIT_PASSWORD = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">8sII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
OPTION_REPLY_MAGIC = 0x3E889045565A9
EXPORT_NAME_REPLY = struct.Struct(">QH")  # size, transmission flags
EXPORT_NAME_PADDING = bytes(124)

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
CHUNK_MAGIC = 0x668E33EF
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset of the request, length
EXTENDED_CHUNK_MAGIC = 0x6E8A278C
DATA_CHUNK = struct.Struct(">IHHQIQ")  # a chunk and the offset its data begins with
EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")

MAX_STRING_BYTES = 4096
MAX_PAYLOAD_BYTES = 1 << 26  # the most that libnbd sends; never in memory as a whole
MIN_BLOCK_BYTES, PREFERRED_BLOCK_BYTES = 1, 4096
MAX_DESCRIPTORS = 1 << 20


class HandshakeFlag(IntFlag):
    """What a server offers in its greeting, and a client accepts."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client may request before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Answers to options; errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    """Kinds of chunks of a structured or extended reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1


CHUNK_DONE = 1
STATE_HOLE, STATE_ZERO = 1, 2  # flags of base:allocation


class WireErrno(IntEnum):
    """The only error numbers that NBD defines (checklist row 27)."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_OF_SYSTEM = {
    errnos.EPERM: WireErrno.EPERM,
    errnos.EROFS: WireErrno.EPERM,
    errnos.EACCES: WireErrno.EPERM,
    errnos.ENOMEM: WireErrno.ENOMEM,
    errnos.EINVAL: WireErrno.EINVAL,
    errnos.ENOSPC: WireErrno.ENOSPC,
    errnos.EDQUOT: WireErrno.ENOSPC,
    errnos.EFBIG: WireErrno.ENOSPC,
    errnos.ENOTSUP: WireErrno.ENOTSUP,
    errnos.ESHUTDOWN: WireErrno.ESHUTDOWN,
}


def wire_errno(system_errno: int) -> WireErrno:
    """The NBD error number for a system's errno; EIO for every errno without one."""
    return _OF_SYSTEM.get(system_errno, WireErrno.EIO)


def option_reply(option: int, kind: Reply, payload: bytes = b"") -> bytes:
    """One answer to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def text_payload(text: str) -> bytes:
    """A string for display, cut to the longest that NBD allows."""
    return text.encode("utf-8", "replace")[:MAX_STRING_BYTES].decode("utf-8", "ignore").encode()
