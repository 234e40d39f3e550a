# SPDX-License-Identifier: Apache-2.0
"""The server's side of the NBD handshake: bytes in, bytes out, and a `Session` at the end.

Decides the answer to each option and when the connection starts transmission, is upgraded to TLS or ends. Sans-IO:
knows no sockets, no disks and no clock; a function lists the exports. Every length is checked against
its limit before anything is stored. While `max_output_bytes` of answers are unsent, no option is processed, so a
client cannot make the server hold more than that, one more answer, and the input of one call.

    receive(bytes) --> output (bytes to send), state
    OPTIONS --STARTTLS--> TLS --secured()--> OPTIONS --GO/EXPORT_NAME--> TRANSMISSION
       `-- ABORT, or an error that has no reply --> CLOSED

Rows named in comments are those of docs/nbd-support.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from vhdkit.serve.nbd import wire
from vhdkit.serve.nbd.wire import HandshakeFlag, Info, Option, Reply, TransmissionFlag

MAX_OPTION_BYTES = 64 * 1024  # of data stored for one option; longer ones are skipped and refused
MAX_SKIPPED_BYTES = 1 << 20  # of such an option; a longer one ends the connection
MAX_QUERIES = 256  # contexts requested in one option
MAX_OUTPUT_BYTES = 256 * 1024  # of answers; further options wait until these are taken
MAX_OPTIONS = 4096  # in one handshake: a client that never finishes is disconnected
_OFFERED = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
_U32, _U16 = struct.Struct(">I"), struct.Struct(">H")


class HandshakeState(Enum):
    """The state of a handshake."""

    OPTIONS = auto()
    TLS = auto()  # send the output in plain text, secure the connection, then call `secured`
    TRANSMISSION = auto()
    CLOSED = auto()  # send the output, then hang up


class TlsMode(Enum):
    """Whether TLS is offered, and what clients may learn without it."""

    OFF = auto()
    OFFERED = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client may learn about an export. `flags` without those a session adds; `contexts` by name.

    `min_block_bytes` is advice for clients that ask: any byte range is served.
    """

    name: str
    description: str
    size_bytes: int
    flags: TransmissionFlag
    contexts: tuple[str, ...]
    min_block_bytes: int = wire.MIN_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Session:
    """The result of the negotiation. `contexts` are (id, name) in the order of the answers."""

    export: ExportInfo
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]


class _Invalid(Exception):
    """The option contradicts its own lengths."""


class Handshake:
    """One connection before its transmission phase."""

    def __init__(self, catalog: Callable[[], Sequence[ExportInfo]], *, tls: TlsMode = TlsMode.OFF) -> None:
        """`catalog` lists the exports as they are now; the first is the default (row 12)."""
        self.state = HandshakeState.OPTIONS
        self.session: Session | None = None
        self.output = bytearray(wire.GREETING.pack(wire.INIT_PASSWORD, wire.OPTION_MAGIC, _OFFERED))
        self._catalog = catalog
        self._tls = tls
        self._secure = False
        self._shutting_down = False
        self._client_flags: HandshakeFlag | None = None
        self._input = bytearray()
        self.max_output_bytes = MAX_OUTPUT_BYTES  # the server lowers it when its memory is scarce
        self._skip = 0  # bytes still to come of an option too long to store
        self._options_left = MAX_OPTIONS
        self.is_held_back = False  # options may wait: take the output, then `receive(b"")`, before receiving more
        self._forget()

    def _forget(self) -> None:
        """Row 20: discard what was negotiated before TLS."""
        self._structured = False
        self._extended = False
        self._context_export: str | None = None
        self._contexts: tuple[tuple[int, str], ...] = ()

    # -- driving ------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | memoryview) -> None:
        """Process what the client sent; afterwards check `output` and `state`."""
        self._input += data
        self.is_held_back = False
        while self.state is HandshakeState.OPTIONS and self._step():
            if len(self.output) >= self.max_output_bytes and self.state is HandshakeState.OPTIONS:
                self.is_held_back = True
                break

    @property
    def kept_bytes(self) -> int:
        """Of input and output."""
        return len(self._input) + len(self.output)

    def take_output(self) -> bytes:
        """The bytes to send now."""
        output = bytes(self.output)
        self.output.clear()
        return output

    def take_rest(self) -> bytes:
        """The bytes after the last option: the first requests of the transmission phase."""
        rest = bytes(self._input)
        self._input.clear()
        return rest

    def secured(self) -> None:
        """Call when the connection is encrypted. Row 22: plain text received after STARTTLS is discarded."""
        assert self.state is HandshakeState.TLS
        self._input.clear()
        self._secure = True
        self._forget()
        self.state = HandshakeState.OPTIONS

    def shut_down(self) -> None:
        """Answer further options with ERR_SHUTDOWN, because the server is about to end (row 41)."""
        self._shutting_down = True

    def _step(self) -> bool:
        """Process one message of the input; False if it is not complete."""
        if self._skip:
            skipped = min(self._skip, len(self._input))
            del self._input[:skipped]
            self._skip -= skipped
            return not self._skip
        if self._client_flags is None:
            return self._take_client_flags()
        if len(self._input) < wire.OPTION.size:
            return False
        magic, option, length = wire.OPTION.unpack_from(self._input)
        if magic != wire.OPTION_MAGIC or self._options_left == 0:  # row 6
            self.state = HandshakeState.CLOSED
            return False
        if length > MAX_OPTION_BYTES:
            return self._refuse_long(option, length)
        end = wire.OPTION.size + length
        if len(self._input) < end:
            return False
        data = bytes(self._input[wire.OPTION.size : end])
        del self._input[:end]
        self._options_left -= 1
        self._answer(option, data)
        return True

    def _take_client_flags(self) -> bool:
        if len(self._input) < wire.CLIENT_FLAGS.size:
            return False
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._input)
        del self._input[: wire.CLIENT_FLAGS.size]
        if flags & ~int(_OFFERED):  # row 2; int, as the complement of an IntFlag has only the named bits
            self.state = HandshakeState.CLOSED
            return False
        self._client_flags = HandshakeFlag(flags)
        return True

    def _refuse_long(self, option: int, length: int) -> bool:
        """Rows 5 and 6: refuse an option that is too long, storing none of it."""
        if length > MAX_SKIPPED_BYTES or option == Option.EXPORT_NAME or not self._fixed:
            self.state = HandshakeState.CLOSED
            return False
        del self._input[: wire.OPTION.size]
        self._skip = length
        self._options_left -= 1
        self._void_contexts(option)
        self._reply(option, Reply.ERR_TOO_BIG, f"an option may have at most {MAX_OPTION_BYTES} bytes of data")
        return True

    @property
    def _fixed(self) -> bool:
        return bool(self._client_flags is not None and self._client_flags & HandshakeFlag.FIXED_NEWSTYLE)

    # -- answering ----------------------------------------------------------------------------------------------

    def _reply(self, option: int, kind: Reply, payload: bytes | str = b"") -> None:
        if isinstance(payload, str):
            payload = wire.text_payload(payload)
        self.output += wire.option_reply(option, kind, payload)

    def _answer(self, option: int, data: bytes) -> None:
        if not self._fixed and option != Option.EXPORT_NAME:  # row 4
            self.state = HandshakeState.CLOSED
            return
        if option == Option.ABORT:  # row 7: also before TLS
            self._reply(option, Reply.ACK)
            self.state = HandshakeState.CLOSED
            return
        if self._shutting_down:
            if option == Option.EXPORT_NAME:
                self.state = HandshakeState.CLOSED
            else:
                self._reply(option, Reply.ERR_SHUTDOWN, "the server is shutting down")
            return
        if self._tls is TlsMode.REQUIRED and not self._secure and option != Option.STARTTLS:  # row 21
            if option == Option.EXPORT_NAME:
                self.state = HandshakeState.CLOSED
            else:
                self._void_contexts(option)
                self._reply(option, Reply.ERR_TLS_REQD, "this server needs TLS")
            return
        handler = _HANDLERS.get(option)
        if handler is None:  # row 5
            self._reply(option, Reply.ERR_UNSUP)
            return
        self._void_contexts(option)
        try:
            handler(self, option, data)
        except _Invalid as problem:
            self._reply(option, Reply.ERR_INVALID, str(problem))

    def _void_contexts(self, option: int) -> None:
        """Row 18: every SET replaces the old set, even if it fails."""
        if option == Option.SET_META_CONTEXT:
            self._context_export, self._contexts = None, ()

    def _find(self, name: str) -> ExportInfo | None:
        exports = self._catalog()
        for export in exports:
            if export.name == name:
                return export
        return exports[0] if exports and not name else None

    def _enter(self, export: ExportInfo) -> TransmissionFlag:
        """The flags of this export in this session; row 16: DF only with structured replies."""
        flags = TransmissionFlag.HAS_FLAGS | export.flags
        if self._structured or self._extended:
            flags |= TransmissionFlag.SEND_DF
        if self._extended and self._contexts_of(export):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _contexts_of(self, export: ExportInfo) -> tuple[tuple[int, str], ...]:
        """Row 19: contexts set for another export are void."""
        return self._contexts if self._context_export == export.name else ()

    def _start(self, export: ExportInfo) -> None:
        structured = self._structured or self._extended
        self.session = Session(export, structured, self._extended, self._contexts_of(export))
        self.state = HandshakeState.TRANSMISSION

    def _export_name(self, option: int, data: bytes) -> None:
        export = (
            None if self._extended or len(data) > wire.MAX_STRING_BYTES else self._find(_text_of(data, strict=False))
        )
        if export is None:  # row 11: no error reply exists
            self.state = HandshakeState.CLOSED
            return
        self.output += wire.EXPORT_NAME_REPLY.pack(export.size_bytes, self._enter(export))
        assert self._client_flags is not None
        if not self._client_flags & HandshakeFlag.NO_ZEROES:  # row 3
            self.output += wire.EXPORT_NAME_PADDING
        self._start(export)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise _Invalid("this option takes no data")
        for export in self._catalog():  # row 8
            name = export.name.encode()
            self._reply(option, Reply.SERVER, _U32.pack(len(name)) + name + wire.text_payload(export.description))
        self._reply(option, Reply.ACK)

    def _start_tls(self, option: int, data: bytes) -> None:
        if data or self._secure:
            raise _Invalid("this option takes no data, and only one TLS session is possible")
        if self._tls is TlsMode.OFF:
            self._reply(option, Reply.ERR_POLICY, "this server has no TLS")
            return
        self._reply(option, Reply.ACK)
        self.state = HandshakeState.TLS

    def _info_or_go(self, option: int, data: bytes) -> None:
        reader = _OptionReader(data)
        name = reader.string()
        wanted = {reader.u16() for _ in range(reader.u16())}
        reader.end()
        export = self._find(name)
        if export is None:
            self._reply(option, Reply.ERR_UNKNOWN, f"no export is named {name!r}")
            return
        info = _U16.pack(Info.EXPORT) + wire.EXPORT_NAME_REPLY.pack(export.size_bytes, self._enter(export))
        self._reply(option, Reply.INFO, info)  # row 9: even if not requested
        if Info.NAME in wanted:
            self._reply(option, Reply.INFO, _U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            self._reply(option, Reply.INFO, _U16.pack(Info.DESCRIPTION) + wire.text_payload(export.description))
        if Info.BLOCK_SIZE in wanted:
            sizes = (export.min_block_bytes, wire.PREFERRED_BLOCK_BYTES, wire.MAX_PAYLOAD_BYTES)
            self._reply(option, Reply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        self._reply(option, Reply.ACK)
        if option == Option.GO:
            self._start(export)

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            raise _Invalid("this option takes no data")
        if self._extended:
            self._reply(option, Reply.ERR_EXT_HEADER_REQD, "extended headers are already negotiated")
            return
        self._structured = True
        self._reply(option, Reply.ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        if data or self._extended:
            raise _Invalid("this option takes no data and may be requested only once")
        self._extended = True
        self._reply(option, Reply.ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        is_set = option == Option.SET_META_CONTEXT
        if is_set and not (self._structured or self._extended):  # row 18
            raise _Invalid("request structured replies first")
        reader = _OptionReader(data)
        name = reader.string()
        count = reader.u32()
        if count > MAX_QUERIES:
            self._reply(option, Reply.ERR_TOO_BIG, f"at most {MAX_QUERIES} queries")
            return
        queries = [reader.string() for _ in range(count)]
        reader.end()
        export = self._find(name)
        if export is None:
            self._reply(option, Reply.ERR_UNKNOWN, f"no export is named {name!r}")
            return
        found = [one for one in export.contexts if _selects(queries, one, is_set=is_set)]
        ids = [number if is_set else 0 for number in range(1, len(found) + 1)]  # row 17: ids in LIST are 0
        for number, context in zip(ids, found, strict=True):
            self._reply(option, Reply.META_CONTEXT, _U32.pack(number) + context.encode())
        self._reply(option, Reply.ACK)
        if is_set:
            self._context_export, self._contexts = export.name, tuple(zip(ids, found, strict=True))


_HANDLERS: dict[int, Callable[[Handshake, int, bytes], None]] = {
    Option.EXPORT_NAME: Handshake._export_name,
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._start_tls,
    Option.INFO: Handshake._info_or_go,
    Option.GO: Handshake._info_or_go,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._meta_context,
    Option.SET_META_CONTEXT: Handshake._meta_context,
    Option.EXTENDED_HEADERS: Handshake._extended_headers,
}


def _selects(queries: Sequence[str], context: str, *, is_set: bool) -> bool:
    """Rows 17 and 18: exact names match; in a LIST also no query at all, and any prefix that ends with a colon.

    `qemu:` and `qemu:dirty-bitmap:` list the contexts with that prefix, as QEMU's server does.
    """
    if is_set:
        return context in queries
    return not queries or any(context == one or (one.endswith(":") and context.startswith(one)) for one in queries)


def _text_of(raw: bytes, *, strict: bool = True) -> str:
    """Row 13. Raises _Invalid when `strict`; else a name that no export has."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text and strict:
        raise _Invalid("a name is not UTF-8 text")
    return text


class _OptionReader:
    """Takes an option's data apart; never reads past its end (row 9)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _take(self, size: int) -> bytes:
        piece = self._data[self._position : self._position + size]
        if len(piece) != size:
            raise _Invalid("the option is shorter than stated")
        self._position += size
        return piece

    def u16(self) -> int:
        return int(_U16.unpack(self._take(_U16.size))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self._take(_U32.size))[0])

    def string(self) -> str:
        size = self.u32()
        if size > wire.MAX_STRING_BYTES:
            raise _Invalid(f"a name may have at most {wire.MAX_STRING_BYTES} bytes")
        return _text_of(self._take(size))

    def end(self) -> None:
        if self._position != len(self._data):
            raise _Invalid("the option is longer than stated")
