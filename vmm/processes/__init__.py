# SPDX-License-Identifier: Apache-2.0
"""The processes of a running machine: who starts whom, and how a worker is reached."""
