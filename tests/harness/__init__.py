# SPDX-License-Identifier: Apache-2.0
"""Tools for proofs about disks: stores that fail, power cuts, kills, models, and images built from the specification.

Each module is complete in itself and is imported by its own name (`from tests.harness.stores import CrashStore`). They
import vhdkit, numpy and each other, `chains` Hypothesis as well, and nothing else: no test, no pytest, nothing of vmm.
So a package for other projects' tests can offer them unchanged. `README.md` beside this file says what each module is
for.
"""
