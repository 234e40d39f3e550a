# SPDX-License-Identifier: Apache-2.0
"""The command `vmm`: one module per verb family. With `vhdkit.cli` the only place that prints or exits."""
