"""Runs command lines one after another on this rank; under torchrun on all ranks: run_lines.py FILE."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_on_two_ranks(lines: Sequence[Sequence[str]], folder: Path, *, timeout_s: float) -> None:
    """Run command lines on two gloo ranks under torchrun; each must succeed."""
    path = folder / "lines.json"
    path.write_text(json.dumps(lines), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*torchrun, __file__, str(path)], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "models")]  # reward rules
    from glm_rlhf.engine.cli import main

    for line in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        code = main(line)
        if code:
            sys.exit(code)
