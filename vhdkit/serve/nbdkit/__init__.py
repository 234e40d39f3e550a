# SPDX-License-Identifier: Apache-2.0
"""The plugin for nbdkit, and how nbdkit is started with it."""
