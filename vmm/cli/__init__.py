# SPDX-License-Identifier: Apache-2.0
"""The command `vmm`: one module per verb family. Only this package and `vhdkit.cli` print or exit."""
