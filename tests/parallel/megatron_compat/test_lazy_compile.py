"""Megatron-core comes without PyTorch's compiler where there is no CUDA, and leaves torch as it was."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys
import torch
compiler = torch.compile
import glm_rlhf.parallel.runtime.topology
import megatron.core.jit
assert torch.compile is compiler
assert "megatron.core" in sys.modules
print(*sorted({"torch._inductor", "torch._dynamo"} & sys.modules.keys()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is, Megatron-core is left alone")
@pytest.mark.parametrize(
    "first, loaded",
    [
        pytest.param("", "", id="ours"),
        pytest.param(
            "import megatron.core", "torch._dynamo torch._inductor", id="theirs", marks=pytest.mark.slow
        ),
    ],
)
def test_the_compiler_is_loaded_only_where_another_imports_megatron_core_first(first, loaded):
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + PROGRAM], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == loaded
