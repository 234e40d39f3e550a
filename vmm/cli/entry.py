# SPDX-License-Identifier: Apache-2.0
"""Where the command `vmm` begins.

Decides what a Ctrl-C means while Python still imports the rest: the process ends by it, without a traceback, since
nothing was begun. Imports nothing of ours before that is settled. What it means from then on is in `failure`.
"""

from __future__ import annotations

import signal


def main() -> None:
    """The command `vmm`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # whoever had it ignored (nohup) meant that
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmm.cli.main import main as command

    command()
