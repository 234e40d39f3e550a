# SPDX-License-Identifier: Apache-2.0
"""The virtual network: switches, adapters and their addresses.

`frames`, `mac`, `plan` and `engine` are pure: they know no sockets, processes or kernel. Each other module does one
kind of outside work. Nothing here knows QEMU: an adapter leaves this package as plain dictionaries and descriptors.
"""
