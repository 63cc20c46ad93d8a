"""Optional accelerations: found by the symbol that is called, active only where something calls it."""

import sys
import types
from pathlib import Path

import megatron.core.optimizer
import megatron.core.optimizer.clip_grads
import pytest
import torch

from glm_rlhf.kernels.dispatch import launch
from glm_rlhf.parallel import fast_paths
from glm_rlhf.parallel.fast_paths import FastPath, probe
from glm_rlhf.parallel.model.varlen_attention import implementation_name

OPTIONAL = ("transformer_engine", "apex", "amp_C", "flash_attn")
NAMES = {
    "Transformer Engine attention",
    "torch variable-length attention",
    "flash-attn package",
    "Transformer Engine FusedAdam",
    "apex FusedAdam",
    "Transformer Engine multi-tensor clipping",
    "apex multi-tensor clipping",
    "Triton kernels",
    "NCCL",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder first on the path, whose packages are gone from this process after the test."""
    loaded = [name for name in sys.modules if name.split(".")[0] in OPTIONAL]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(launch.ENVIRONMENT_VARIABLE, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in OPTIONAL and name not in loaded]:
        del sys.modules[name]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a Hopper GPU is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def _package(folder: Path, **sources: str) -> None:
    """Write modules, named by dotted path with `__` for a dot."""
    for name, source in sources.items():
        *parents, stem = name.split("__")
        for depth in range(len(parents)):
            package = folder.joinpath(*parents[: depth + 1])
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()
        (folder.joinpath(*parents) / f"{stem}.py").write_text(source)


def _found() -> dict[str, FastPath]:
    return {path.name: path for path in probe()}


def test_every_acceleration_is_reported_with_its_reason():
    found = _found()
    assert set(found) == NAMES
    for path in found.values():
        assert path.reason
        assert bool(path.used_instead) != path.is_active


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA uses")
def test_without_cuda_nothing_is_active():
    found = _found()
    assert [path.name for path in found.values() if path.is_active] == []
    assert found["NCCL"].used_instead == "gloo"
    assert found["Triton kernels"].used_instead == "the fp32 torch reference"
    assert found["torch variable-length attention"].reason == "needs a CUDA device, this process sees none"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)  # imports of it fail, installed or not
    found = _found()
    assert found["Transformer Engine attention"].reason.startswith("transformer_engine")
    assert found["flash-attn package"].reason.startswith("flash_attn")
    assert "is built from source" in found["apex FusedAdam"].reason


def test_every_implementation_of_attention_has_a_name_here(cuda: None):
    for device_type in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            assert implementation_name(device_type, dtype) in fast_paths._ATTENTION


def test_another_project_named_apex_is_not_taken_for_nvidias(
    monkeypatch: pytest.MonkeyPatch, bare: Path, cuda: None
):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    path = _found()["apex FusedAdam"]
    assert not path.is_active
    assert path.reason.startswith("apex is installed, but there is no module apex.optimizers")
    assert "the package index's apex is another project" in path.reason

    monkeypatch.delitem(sys.modules, "apex")
    _package(bare, apex__optimizers="class SomethingElse: pass")
    path = _found()["apex FusedAdam"]
    assert not path.is_active
    assert path.reason.startswith("apex.optimizers is installed but has no FusedAdam")


def test_a_package_whose_own_needs_are_missing_is_not_active(bare: Path, cuda: None):
    _package(bare, apex__optimizers="import wtforms_of_long_ago")
    assert "there is no module wtforms_of_long_ago" in _found()["apex FusedAdam"].reason


def test_nvidias_apex_is_active_where_megatron_core_has_chosen_it(
    monkeypatch: pytest.MonkeyPatch, bare: Path, cuda: None
):
    _package(
        bare,
        apex__optimizers="class FusedAdam: pass",
        apex__multi_tensor_apply="multi_tensor_applier = print",
        amp_C="def multi_tensor_scale(): pass",
    )
    found = _found()
    assert found["apex FusedAdam"].reason == "installed, not chosen"
    assert found["apex FusedAdam"].used_instead == "torch's AdamW"

    from amp_C import multi_tensor_scale
    from apex.optimizers import FusedAdam

    monkeypatch.setattr(megatron.core.optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(megatron.core.optimizer.clip_grads, "multi_tensor_scale_impl", multi_tensor_scale)
    found = _found()
    assert found["apex FusedAdam"].is_active
    assert found["apex FusedAdam"].reason == "apex.optimizers.FusedAdam"
    assert found["apex multi-tensor clipping"].is_active
    assert found["Transformer Engine FusedAdam"].used_instead == "apex's FusedAdam"


def test_amp_c_without_apexs_applier_is_not_active(bare: Path, cuda: None):
    _package(bare, amp_C="def multi_tensor_scale(): pass")
    assert _found()["apex multi-tensor clipping"].reason == "apex is not installed"


def test_transformer_engine_is_active_where_attention_has_chosen_it(
    monkeypatch: pytest.MonkeyPatch, bare: Path, cuda: None
):
    _package(bare, transformer_engine__pytorch="class DotProductAttention: pass")
    monkeypatch.setattr(fast_paths, "implementation_name", lambda device, dtype: "transformer_engine")
    found = _found()
    assert found["Transformer Engine attention"].is_active
    assert found["torch variable-length attention"].reason == "installed, not chosen"
    assert found["torch variable-length attention"].used_instead == "Transformer Engine attention"


@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "ImportError"])
def test_a_broken_build_is_reported_and_not_raised(bare: Path, error: str):
    _package(bare, transformer_engine__pytorch=f"raise {error}('libcudart.so.12: cannot open\\nmore')")
    path = _found()["Transformer Engine attention"]
    assert not path.is_active
    assert path.reason == (
        "transformer_engine.pytorch is installed but does not import: libcudart.so.12: cannot open"
    )


def test_the_kernels_choice_is_the_launchers(monkeypatch: pytest.MonkeyPatch, cuda: None):
    assert _found()["Triton kernels"].reason == "compiled for sm_90"
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "reference")
    path = _found()["Triton kernels"]
    assert (path.is_active, path.used_instead) == (False, "the fp32 torch reference")
    assert path.reason == "GLM_RLHF_KERNELS=reference selects the reference"
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="unknown choice 'fast'"):
        probe()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA uses")
@pytest.mark.parametrize(
    ("is_interpreting", "instead"), [(True, "Triton's interpreter"), (False, "nothing: every kernel raises")]
)
def test_triton_without_cuda_is_the_interpreter_or_nothing(
    monkeypatch: pytest.MonkeyPatch, is_interpreting: bool, instead: str
):
    monkeypatch.setenv(launch.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setattr(launch, "is_interpreting", lambda: is_interpreting)
    path = _found()["Triton kernels"]
    assert not path.is_active
    assert path.used_instead.startswith(instead)
