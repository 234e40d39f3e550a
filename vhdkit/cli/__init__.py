# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call the library, print. The only place that prints or exits.

`main` is the command; `common`, `output`, `progress` and `failure` are shared; every other module is one family of
verbs.
"""

import os

# numpy's linear algebra starts a thread per processor that spins for a while, and nothing here multiplies matrices.
# It looks at this when it is first imported, which is after this line.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
