# SPDX-License-Identifier: Apache-2.0
"""VHDX images, as Hyper-V writes them since 2012: fixed, dynamic and differencing (`.vhdx`, `.avhdx`)."""
