"""Patches that run Megatron-core on a machine without CUDA; they do nothing with CUDA.

Some modules of Megatron-core 0.16 hard-code the device "cuda". `install` replaces their global name `torch`
by a proxy that redirects such requests to the CPU. Only Megatron's modules see the proxy: the rest of the
process uses the real torch, and no operation is slower.
"""

import contextlib
import ctypes
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MODULES = (
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "tensor_parallel.data",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "utils",
)
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")


def is_needed() -> bool:
    """Return whether this process has no CUDA device, so that Megatron-core needs the patches."""
    return not torch.cuda.is_available()


def install() -> None:
    """Patch Megatron-core to run on the CPU; does nothing with CUDA, or when called again."""
    if is_needed():
        _install()


@functools.cache
def _install() -> None:
    proxy = _TorchOnCPU()
    for name in _MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        if isinstance(getattr(module, "torch", None), types.ModuleType):
            module.torch = proxy
    _keep_freed_memory()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = functools.wraps(random._get_cuda_rng_state)(_rng_state)
    random._set_cuda_rng_state = functools.wraps(random._set_cuda_rng_state)(_set_rng_state)


def _rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _keep_freed_memory() -> None:
    """Let malloc reuse freed blocks of up to 1 GiB, instead of returning them to the kernel.

    Otherwise each temporary of some MB is mapped and zeroed anew: three quarters of a decode step.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library without these settings
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Make `Tensor.type()` of CPU tensors report the CUDA name in a block; does nothing with CUDA.

    Megatron-core's optimizers sort parameters by that string when they are built, and assert it when they
    clip.
    """
    if not is_needed():
        yield
        return
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name
    try:
        yield
    finally:
        torch.Tensor.type = original


class _TorchOnCPU:
    """A proxy of `torch` that redirects requests for a CUDA device to the CPU."""

    def __init__(self) -> None:
        self.cuda = _CudaOnCPU()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        setattr(self, name, value)
        return value


class _CudaOnCPU:
    """The part of `torch.cuda` that Megatron-core calls, mapped to the CPU or doing nothing."""

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: Any) -> None:
        """Do nothing: CPU work is synchronous."""

    @staticmethod
    def empty_cache() -> None:
        """Do nothing: the CPU has no such cache."""

    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        names_cuda = device is not None and torch.device(device).type == "cuda"
        if names_cuda:
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make
