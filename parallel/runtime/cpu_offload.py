"""Tensors moved to host memory during phases that do not use them, so that their device memory is free.

Offloading copies a storage to the host and resizes it to zero; prefetching fills it again, possibly at
another address. Tensors over the storage stay the same objects and must not be used in between. On CUDA the
copies run on a separate stream between device and pinned memory, and the host does not wait: device memory is
free once the copy is done, and work that uses a prefetched tensor waits for its copy. On a CPU the copies are
synchronous: this saves nothing there, but is tested there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class CpuOffload:
    """Owns the host copies of some tensors, and knows whether the device has their contents."""

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], *, device: torch.device, changes: bool = True
    ) -> None:
        """Offload nothing yet.

        Args:
            tensors: returns the tensors to offload; called each time, since some may be created later. Whole
                storages are offloaded, including other tensors in them.
            device: of the tensors.
            changes: whether their contents change while on the device; if not, they are copied once.
        """
        self._tensors, self._changes = tensors, changes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hosts: dict[int, torch.Tensor] = {}  # by the index of the storage
        self._offloaded: list[torch.UntypedStorage] = []
        self._is_prefetching = False

    @property
    def offloaded_bytes(self) -> int:
        """Bytes that are on the host only."""
        return sum(self._hosts[index].numel() for index in range(len(self._offloaded)))

    @torch.no_grad()
    def offload(self) -> None:
        """Start to move contents to the host; do nothing if they are there already."""
        if self._offloaded:
            return
        self.wait()
        self._offloaded = _storages(self._tensors())
        with self._copying():
            for index, storage in enumerate(self._offloaded):
                content = _bytes_of(storage)
                host = self._hosts.get(index)
                if host is None or host.numel() != content.numel():
                    host = torch.empty(
                        content.numel(), dtype=torch.uint8, pin_memory=self._stream is not None
                    )
                    self._hosts[index] = host
                    host.copy_(content, non_blocking=True)
                elif self._changes:
                    host.copy_(content, non_blocking=True)
                if self._stream is not None:
                    content.record_stream(self._stream)
                storage.resize_(0)

    @torch.no_grad()
    def prefetch(self) -> None:
        """Start to copy contents back to the device, overlapped with the work up to `wait`."""
        for index, storage in enumerate(self._offloaded):
            storage.resize_(self._hosts[index].numel())  # allocated by the stream that uses it
        with self._copying():
            for index, storage in enumerate(self._offloaded):
                _bytes_of(storage).copy_(self._hosts[index], non_blocking=True)
        self._is_prefetching = self._is_prefetching or bool(self._offloaded)
        self._offloaded = []

    def wait(self) -> None:
        """Make the contents available on the device to all work that follows."""
        self.prefetch()
        if self._is_prefetching and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_prefetching = False

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Run copies after the work queued so far; on CUDA on a separate stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return each non-empty storage once, in the order of the tensors.

    Memory shared with numpy, as that of weights read on a CPU, is not resizable and is left as it is.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in storages.values() if storage.nbytes() and storage.resizable()]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
