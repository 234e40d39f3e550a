# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command `vmm`.

Decides what a Ctrl-C means while Python is still importing modules: the process ends without a traceback, because
nothing has been done yet. Nothing else of vmm is imported before that is set up. What it means later is
decided in `failure`.
"""

from __future__ import annotations

import gc
import os
import signal

is_own_process = False  # True in a process that is the command `vmm`, not a program that calls it


def main() -> None:
    """Entry point of the command `vmm`."""
    global is_own_process  # noqa: PLW0603
    is_own_process = True
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # an ignored signal (nohup) stays ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # vmm uses no plugins of pydantic, and the search for them reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.disable()  # until the group has imported the verb: imports create no garbage, and looking for it takes time
    from vmm.cli.main import main as command

    command()
