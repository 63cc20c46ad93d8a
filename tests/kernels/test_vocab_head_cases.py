"""The tiles made for one generation of devices fit it: no register is spilled there."""

import json
import os
import subprocess
import sys

import pytest

from glm_rlhf.kernels import vocab_head
from glm_rlhf.kernels.compile_ahead import SHARED_LIMIT_BYTES
from glm_rlhf.kernels.vocab_head_cases import compile_cases


@pytest.mark.parametrize(("name", "capability"), [("hopper", 90), ("blackwell", 100)])
def test_tiles_do_not_spill_where_they_are_launched(tmp_path, name, capability):
    report = tmp_path / "kernels.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "glm_rlhf.kernels.compile_ahead", "--json", str(report)]
    finished = subprocess.run(
        [*command, "--only", f"_{name}/", "--capability", str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), finished.stderr[-3000:]
    results = json.loads(report.read_text(encoding="utf-8"))
    assert len(results) == 3  # forward, forward that keeps, backward
    for result in results:
        assert not result["error"]
        assert result["spill_bytes"] == 0
        assert result["shared_bytes"] <= SHARED_LIMIT_BYTES[capability]


def test_only_what_runs_everywhere_is_called_hot():
    for case in compile_cases():
        is_special = any(f"_{name}/" in case.name for name in ("hopper", "blackwell"))
        assert case.is_hot != is_special
        assert not is_special or "only" in case.notes


def test_every_tile_has_its_cases():
    shapes = [s for s in vars(vocab_head).values() if isinstance(s, vocab_head.TileShape)]
    bf16_shapes = [shape for shape in shapes if shape is not vocab_head.FLOAT32]
    cases = [case for case in compile_cases() if "BLOCK_D" in case.constexprs]
    assert len(cases) == 3 * len(bf16_shapes)
    for shape in bf16_shapes:
        fitting = [c for c in cases if c.constexprs["BLOCK_V"] == shape.columns]
        assert any(c.num_stages == shape.num_stages and c.num_warps == shape.num_warps for c in fitting)
