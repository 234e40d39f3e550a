# SPDX-License-Identifier: Apache-2.0
"""Guests for tests, benchmarks and the demo, made when they are first needed; no binary of them is kept in the
project.

- `boot_sector`: five sectors for the BIOS: says BOOT-OK, reads and writes the disk, counts, obeys keys. Boots in a
  tenth of a second under TCG and in three under the KVM that can run it. From any controller.
- `linux`: Debian's cloud kernel, busybox, qemu's guest agent and a KVP agent. A shell in about five seconds of TCG.
- `shell`: runs commands inside it over its serial port.
- `launch`: a bare QEMU for tests of rooms that need a guest and no worker.
"""
