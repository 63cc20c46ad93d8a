"""CUDA graphs: operators and kernels are recorded as they run, and replayed on the same memory."""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

NEEDS_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "aten::equal")
"""Parts of the names of operators whose result, or its size, the host must know."""

_open: list["_Recorder"] = []
counts = {"recorded": 0, "replayed": 0}
"""Number of graphs of this process; printed at its end if `CUDA_STAND_IN_COUNTS` is set."""


class Graph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.recorder = _Recorder()

    def replay(self) -> None:
        counts["replayed"] += 1
        for again in self.recorder.steps:
            again()


@contextlib.contextmanager
def recording(graph: Graph, *_: object, **__: object) -> Iterator[None]:
    """As `torch.cuda.graph`, but recorded operators also run."""
    counts["recorded"] += 1
    _open.append(graph.recorder)
    try:
        with graph.recorder:
            yield
    finally:
        _open.pop()


def watch_kernels() -> None:
    """Make Triton's interpreter refuse host tensors, and record its launches."""
    launch = GridExecutor.__call__

    def watched(self: GridExecutor, *args: object, **options: object) -> None:
        if any(isinstance(value, torch.Tensor) and not value.is_cuda for value in (*args, *options.values())):
            raise ValueError("a kernel was given a tensor of the host")
        if _open:
            _open[-1].steps.append(lambda: launch(self, *args, **options))
        with _disable_current_modes():
            launch(self, *args, **options)

    GridExecutor.__call__ = watched
    if os.environ.get("CUDA_STAND_IN_COUNTS"):
        atexit.register(lambda: counts["recorded"] and print(f"graphs: {counts}", flush=True))


class _Recorder(TorchDispatchMode):
    """Records what runs inside it; raises for what a capturing stream refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        name = operator.name()
        needs_host = any(part in name for part in NEEDS_THE_HOST) or _picks_by_mask(name, args)
        if needs_host or _crosses(name, args, kwargs):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        output = operator(*args, **kwargs)
        if not _does_nothing(name, output, args, kwargs):
            self.steps.append(lambda: _again(operator, args, kwargs, output))
        return output


def _again(operator: Any, args: tuple, kwargs: dict, recorded: Any) -> None:
    """Run an operator again, into the memory of its recorded output."""
    output = operator(*args, **kwargs)
    for target, fresh in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(output), strict=True):
        if isinstance(target, torch.Tensor):
            if target.data_ptr() != fresh.data_ptr():
                target.copy_(fresh)
        elif isinstance(fresh, torch.ScriptObject):  # of a collective: on a device its stream would wait
            dist.Work.unbox(fresh).wait()


def _crosses(name: str, args: tuple, kwargs: dict) -> bool:
    """Return whether an operator copies between host and device."""
    if name not in ("aten::copy_", "aten::_to_copy"):
        return False
    devices = {leaf.device.type for leaf in _tensors(args, kwargs)}
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    return len(devices) > 1


def _picks_by_mask(name: str, args: tuple) -> bool:
    """Return whether an operator selects elements by a mask, whose count the host must know."""
    return name == "aten::index.Tensor" and any(tensor.dtype is torch.bool for tensor in _tensors(args[1]))


def _does_nothing(name: str, output: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether an operator only allocates memory, or only makes a view of its arguments."""
    if name.startswith(("aten::empty", "aten::new_empty")):
        return True
    if not name.startswith("aten::"):  # a collective returns what it wrote to
        return False
    inputs, outputs = _tensors(args, kwargs), _tensors(output)
    addresses = {_address(tensor) for tensor in inputs}
    is_new = all(not any(tensor is one for one in inputs) for tensor in outputs)  # in place, it is the same
    return bool(outputs) and is_new and all(_address(tensor) in addresses for tensor in outputs)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
