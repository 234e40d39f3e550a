# SPDX-License-Identifier: Apache-2.0
"""Programs that only have to pass the type checker."""
