# SPDX-License-Identifier: Apache-2.0
"""What is done at set times: when, by which timer, one run at a time, and what became of it; not what the jobs do."""
