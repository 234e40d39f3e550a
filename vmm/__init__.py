# SPDX-License-Identifier: Apache-2.0
"""A thin KVM/QEMU virtual-machine manager whose disks are vhdkit chains.

The public names, nothing else. This version has none yet.
"""

__all__: list[str] = []
