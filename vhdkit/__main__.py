# SPDX-License-Identifier: Apache-2.0
"""`python -m vhdkit`: the same as the command `vhdkit`."""

from vhdkit.cli.entry import main

if __name__ == "__main__":
    main()
