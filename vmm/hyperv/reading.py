# SPDX-License-Identifier: Apache-2.0
"""Reading a file of a Hyper-V machine: which reader it gets.

Decides that by the content, not by the name, and what is said about other files. Must not know
what any key means. Files are opened for reading alone, without waiting, and only if they are regular ones.
"""

from __future__ import annotations

import os
import stat

from vmm.hyperv.container import Container, is_container
from vmm.hyperv.key_tables import read_keys
from vmm.hyperv.keys import Key
from vmm.hyperv.layout import HEADER_OFFSETS
from vmm.hyperv.problems import refuse
from vmm.hyperv.xml_file import MAX_XML_BYTES, is_xml, read_xml
from vmm.model.errors import BadConfiguration, of_os_error

_START_BYTES = 512
_NOT_READ = {
    ".exp": "it is an export of Windows Server 2008 or 2008 R2, which is not read",
    ".bin": "it is the saved memory of a machine, which only Hyper-V can load",
    ".vsv": "it is the saved state of a machine's devices, which only Hyper-V can load",
    ".vmgs": "it holds UEFI variables and a TPM, not a configuration",
}
_HINTS = {
    ".exp": "copy the machine's live folder from the host instead: `Virtual Machines` and `Snapshots` with their XML"
}


def read(path: str) -> Key:
    """The tree of a configuration's keys, below a key without a name.

    Raises BadConfiguration if the file is damaged or none, NotFound and other VmmErrors if it cannot be read.
    """
    suffix = os.path.splitext(path)[1].lower()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if stat.S_ISDIR(facts.st_mode):
                refuse(path, "it is a folder; name a configuration in it (*.vmcx or *.xml)", hint=None)
            if not stat.S_ISREG(facts.st_mode):
                refuse(path, "it is not a regular file", hint=None)
            if suffix in _NOT_READ:
                raise BadConfiguration(_NOT_READ[suffix], path=path, hint=_HINTS.get(suffix))
            return read_open(path, descriptor, facts.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise of_os_error(error, "read the configuration", path=path) from error


def read_open(path: str, descriptor: int, size_bytes: int) -> Key:
    """The same of a file that is open; `path` is for messages. Raises BadConfiguration, OSError."""
    first, second = HEADER_OFFSETS
    start = os.pread(descriptor, _START_BYTES, first)
    if is_container(start, os.pread(descriptor, _START_BYTES, second)):
        container = Container(path, descriptor, size_bytes)
        container.replay()
        return read_keys(container)
    if is_xml(start):
        return read_xml(path, os.pread(descriptor, MAX_XML_BYTES + 1, 0))
    if not size_bytes:
        refuse(path, "it is empty")
    refuse(path, "it is not a configuration of Hyper-V: neither XML nor VMCX", hint=None)
