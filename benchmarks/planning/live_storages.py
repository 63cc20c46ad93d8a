"""The most bytes of tensors that are alive at once while some work runs, seen operation by operation.

torch's profiler misses what threads of a communication library release, so that tensors which a collective
touched never seem to be freed. Here each storage is counted from the operation that first returns it until
Python frees it. Memory that an operation allocates and frees inside itself is not seen.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def live_peak_bytes(work: Callable[[], Any]) -> int:
    """Return the peak of what `work` holds beyond what was there before; this thread's operations count."""
    with _Live() as live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts storages from the operation that returns them until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            self._count(value, is_new=False)
        result = operation(*args, **kwargs)
        for value in tree_iter(result):
            self._count(value, is_new=True)
        self.peak = max(self.peak, self.held)
        return result

    def _count(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = storage.nbytes() if is_new else 0
        self.held += num_bytes

        def forget(_: weakref.ref) -> None:
            self._known.pop(key, None)
            self.held -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
