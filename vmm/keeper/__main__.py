# SPDX-License-Identifier: Apache-2.0
"""`python -m vmm.keeper`: how a worker of vmm 0.1.0, which may outlive an upgrade, restarts its supervisor."""

from vmm.processes.supervisor import main

if __name__ == "__main__":
    main()
