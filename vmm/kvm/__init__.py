# SPDX-License-Identifier: Apache-2.0
"""QEMU and KVM: command lines, processes, the monitor, drives, the guest's own channels. Knows nothing of switches."""
