"""The command line as a module: `python -m glm_rlhf.engine`, `torchrun -m glm_rlhf.engine`."""

import sys

from glm_rlhf.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
