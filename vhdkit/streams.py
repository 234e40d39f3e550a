# SPDX-License-Identifier: Apache-2.0
"""Sequential reads of one file: each stream has an open description of its own.

Decides which large reads form a stream, and through which descriptor they go. Must not know what the bytes mean.

The kernel keeps the state of its read-ahead in the open file description: where the last read ended, how far it has
read ahead, and in how large pieces. If other reads come in between through the same description, it starts anew each
time. Left alone it reads ahead in windows that grow up to the device's limit (`read_ahead_kb`), into large folios, and
also for reads that do not wait (RWF_NOWAIT). Measured on ext4 with Linux 6.18: 150 us of processor time for each MiB
that was read in this way and copied, against 440 us after POSIX_FADV_WILLNEED, which reads into single pages. (In a
virtual machine whose free memory goes back to the host, the first use of a large folio costs that gain and more.)
Hints beside it do harm: what they bring carries no mark at which the kernel would go on by itself, so one hint makes
the next one necessary. They are only made where the device's limit is low.

    shared description:   small reads, random reads            ──► file
    a stream's own:       1 ──► 2 ──► 3 ──► (read ahead by the kernel)

`INV-STREAMS-BOUNDED`: a file has at most `MAX_STREAMS` such descriptors. They serve new streams when old ones end, and
are closed with the file.
"""

from __future__ import annotations

import os
import threading

from vhdkit import page_cache, space
from vhdkit.descriptor import Descriptor, held, opened
from vhdkit.named import NamedFile
from vhdkit.units import KIB, MIB

LARGE_BYTES = 64 * KIB  # shorter reads are not looked at, so that they cost nothing more
MAX_STREAMS = 4  # of a file: the kernel reads at most twice its limit ahead, together 64 MiB where that is 8 MiB
_MAX_GAP_BYTES = 64 * KIB  # between two reads that begin a stream: what lies between the blocks of an image
_MAX_LEFT_OUT_BYTES = 4 * MIB  # of a stream: reads whose place is not known yet come later
_MAX_BACK_BYTES = 8 * MIB  # reads that waited are tried again, while later ones are made
_AHEAD_BYTES = 16 * MIB  # twice the usual limit
_REMEMBERED_ENDS = 16  # of reads outside streams
_FAR_BYTES = 4 * MIB  # of the kernel's limit: with a lower one, hints bring more in time

_preadv = os.preadv


class Stream(Descriptor):
    """A second descriptor of a file, for a stream that was read up to `position`."""

    def __init__(self, owned: list[int], path: str, position: int) -> None:
        """Take over the descriptor in the list."""
        super().__init__(owned, path, writable=False)
        self.position = position

    def try_read(self, offset_bytes: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that needs no waiting; what is missing is begun to be read. Raises OSError."""
        inside = self.inside
        try:
            inside.append(None)
            return _preadv(self._fd, (buffer,), offset_bytes, os.RWF_NOWAIT) == buffer.nbytes
        except BlockingIOError:
            return False
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()

    @held
    def send(self, socket_fd: int, offset_bytes: int, size_bytes: int) -> int:
        """See `sending.SentFile.send`; the data are there. Raises OSError, DiskClosed."""
        return os.sendfile(socket_fd, self._fd, offset_bytes, size_bytes)


class StreamedFile(NamedFile):
    """A named file that recognises the streams among its large reads."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """See `NamedFile`."""
        super().__init__(owned, path, writable=writable)
        self._streams: list[Stream] = []  # the one used last is the last
        self._ends: dict[int, None] = {}  # of reads outside streams
        self._streams_lock = threading.Lock()
        self.has_streams = True
        self._is_in_memory: bool | None = None  # not known yet
        self._reads_far = False  # the kernel, ahead of streams

    @held
    def is_in_memory(self) -> bool:
        """Called where the system cannot read without waiting: whether the file system never waits. If not, it has no
        streams, as even opening the file may wait there. Asked once, because FUSE answers by itself, or never.
        """
        if self._is_in_memory is None:
            self._is_in_memory = space.is_in_memory(self._fd)
            self.has_streams &= self._is_in_memory
        return self._is_in_memory

    def try_stream(self, offset_bytes: int, buffer: memoryview) -> bool | None:
        """Try a large read through its stream; None if it has to be tried otherwise. Raises DiskClosed."""
        stream = self.stream_of(offset_bytes, buffer.nbytes)
        if stream is not None:
            try:
                return stream.try_read(offset_bytes, buffer)
            except OSError:  # found again, and reported, through the shared description
                self.has_streams = False
        return None

    @held
    def stream_of(self, offset: int, size: int) -> Stream | None:
        """The stream to which a large read belongs, if any. Raises DiskClosed."""
        if not self.has_streams:
            return None
        end = offset + size
        with self._streams_lock:
            for stream in reversed(self._streams):
                if stream.position - _MAX_BACK_BYTES <= offset <= stream.position + _MAX_LEFT_OUT_BYTES:
                    stream.position = max(stream.position, end)
                    self._use_last(stream)
                    return stream
            for last in self._ends:
                if 0 <= offset - last <= _MAX_GAP_BYTES:
                    del self._ends[last]
                    return self._begin(end)
            self._ends[end] = None
            if len(self._ends) > _REMEMBERED_ENDS:
                del self._ends[next(iter(self._ends))]
        return None

    def _begin(self, position: int) -> Stream | None:
        if len(self._streams) == MAX_STREAMS:
            stream = self._streams[0]
            stream.position = position
            self._use_last(stream)
            return stream
        try:
            path = f"/proc/self/fd/{self._fd}"
            stream = Stream(opened(path, os.O_RDONLY | os.O_CLOEXEC), self._path, position)
            self._reads_far = page_cache.read_ahead_bytes(self._fd) >= _FAR_BYTES
        except OSError:  # no /proc, no permission, no descriptor left
            self.has_streams = False
            return None
        self._streams.append(stream)
        if self._fd < 0:  # closed meanwhile, by a signal handler
            stream.close_descriptor()
        return stream

    def _use_last(self, stream: Stream) -> None:
        if stream is not self._streams[-1]:
            self._streams.remove(stream)
            self._streams.append(stream)

    def is_streamed_to(self, offset_bytes: int) -> bool:
        """True if the kernel, reading ahead of a stream, comes to this place, and a hint would only be in its way."""
        return self._reads_far and any(
            one.position - _MAX_BACK_BYTES <= offset_bytes <= one.position + _AHEAD_BYTES for one in self._streams
        )

    def close_descriptor(self) -> None:
        """See `Descriptor.close_descriptor`; the streams' are closed, too. Raises OSError."""
        super().close_descriptor()
        for stream in self._streams:
            stream.close_descriptor()
