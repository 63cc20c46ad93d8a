"""Makes the benchmarks importable, wherever the tests are started from."""

import sys
from pathlib import Path

# Last, so that no bare name of ours hides an installed package.
sys.path.append(str(Path(__file__).resolve().parents[2]))
