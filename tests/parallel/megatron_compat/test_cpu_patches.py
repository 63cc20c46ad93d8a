"""Without CUDA, Megatron-core's modules get a torch that answers for it; the process's own stays as it is."""

import importlib
import types
from importlib.util import find_spec

import pytest
import torch
from upstream import Upstream, moved

from glm_rlhf.parallel.megatron_compat import cpu_patches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where CUDA is")
MODULES = [f"megatron.core.{name}" for name in cpu_patches._MODULES]


def check_module(name: str, text: str) -> None:
    upstream = Upstream(patch="cpu_patches.install", symbol=f"{name}:torch")
    assert "\nimport torch\n" in text, moved(upstream, "is not imported by that name")
    assert "cuda" in text, moved(upstream, "is asked for no CUDA device any more")


@pytest.mark.parametrize("name", MODULES)
def test_each_patched_module_uses_torch_by_that_name(name):
    check_module(name, find_spec(name).loader.get_source(name))


@pytest.mark.parametrize("text", ["from torch import cuda\n", "\nimport torch\n"])
def test_a_module_that_has_changed_is_named(text):
    with pytest.raises(
        AssertionError, match=r"^cpu_patches\.install .* relies on megatron\.core\.utils:torch"
    ):
        check_module("megatron.core.utils", text)


def test_megatron_core_s_modules_alone_see_the_stand_in():
    cpu_patches.install()
    stand_ins = {importlib.import_module(name).torch for name in MODULES}
    assert len(stand_ins) == 1
    (stand_in,) = stand_ins
    assert not isinstance(stand_in, types.ModuleType)
    assert isinstance(torch, types.ModuleType)
    for name in cpu_patches._FACTORIES:
        arguments = {"empty_like": (torch.ones(2),), "zeros_like": (torch.ones(2),), "full": ([2], 1.0)}.get(
            name, (2,)
        )
        made = getattr(stand_in, name)(*arguments, device="cuda")
        assert made.device.type == "cpu", moved(
            Upstream(patch="cpu_patches.install", symbol=f"torch:{name}"), "makes tensors elsewhere"
        )
    assert stand_in.cuda.current_device() == torch.device("cpu")
    assert stand_in.float32 is torch.float32
    cpu_patches.install()
    assert importlib.import_module(MODULES[0]).torch is stand_in, "done once"


def test_the_cuda_generator_is_the_cpu_s():
    cpu_patches.install()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    before = torch.get_rng_state()
    assert torch.equal(random._get_cuda_rng_state(clone=True, graph_safe=False), before)
    torch.rand(3)
    random._set_cuda_rng_state(before, device=-1, graph_safe=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_types_are_called_as_on_cuda_inside_the_context_alone():
    upstream = Upstream(patch="cpu_patches.cuda_type_names", symbol="torch:Tensor.type")
    assert torch.ones(1).type() == "torch.FloatTensor", moved(upstream, f"says {torch.ones(1).type()}")
    with cpu_patches.cuda_type_names():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type(torch.float64).dtype is torch.float64
    assert torch.ones(1).type() == "torch.FloatTensor"
