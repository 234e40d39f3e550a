# SPDX-License-Identifier: Apache-2.0
"""Microsoft Virtual Hard Disk: fixed, dynamic and differencing images (`.vhd`, `.avhd`)."""
