# SPDX-License-Identifier: Apache-2.0
"""`python -m vmm.worker`: how a supervisor of vmm 0.1.0, which may outlive an upgrade, restarts its worker."""

from vmm.worker.worker import main

if __name__ == "__main__":
    main()
