# SPDX-License-Identifier: Apache-2.0
"""The tests. Folders mirror the packages; tests of the whole project are in this one."""
