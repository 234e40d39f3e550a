# SPDX-License-Identifier: Apache-2.0
"""Where the commands `vhdkit` and `vhdkit-mount` begin.

Decides what a Ctrl-C means while Python is still importing modules: the process ends without a traceback, because
nothing has been done yet. Nothing else of vhdkit is imported before that is set up; once `main` runs, the verbs
decide. Also decides that garbage is not collected until the verb is imported: imports leave none, and looking for it
takes a twentieth of the start-up time.
"""

from __future__ import annotations

import gc
import signal


def end_quietly() -> None:
    """Let Ctrl-C end the process until a handler is installed. If it is ignored (nohup), it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The command `vhdkit`."""
    end_quietly()
    gc.disable()  # until the group has imported the verb
    from vhdkit.cli.main import main as command

    command()


def mount_program() -> None:
    """The program `vhdkit-mount IMAGE MOUNTPOINT -o OPTIONS`, as mount.fuse3 calls it for a line of /etc/fstab."""
    end_quietly()
    gc.disable()
    from vhdkit.cli.main import mount_program as command

    command()
