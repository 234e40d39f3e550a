# SPDX-License-Identifier: Apache-2.0
"""The tests. Folders mirror the packages; what looks at the whole project lies here."""
