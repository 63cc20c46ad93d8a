"""Tensors whose contents wait in host memory while a phase does not need them; their device memory is free.

Offloading copies a storage to the host and resizes it to zero; prefetching fills it again, perhaps at another
address. The tensors over it stay the same objects, and must not be used in between. On CUDA both copies run
on a stream of their own, between device and pinned memory, and the host waits for none of them: what is
offloaded is free once it is copied, and what is prefetched is waited for by the work that uses it. On a CPU
the same happens at once: it gains nothing there, and is tested there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class CpuOffload:
    """Owns the host's copies of some tensors, and knows whether the device has their contents."""

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], *, device: torch.device, changes: bool = True
    ) -> None:
        """Offload nothing yet.

        Args:
            tensors: gives what to offload, asked each time, since some may come later; storages are offloaded
                whole, with whatever else lies in them.
            device: where they are.
            changes: whether their contents change while they are on the device; what does not is copied once.
        """
        self._tensors, self._changes = tensors, changes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hosts: dict[int, torch.Tensor] = {}  # by the place among the storages
        self._offloaded: list[torch.UntypedStorage] = []
        self._is_coming = False

    @property
    def offloaded_bytes(self) -> int:
        """What the device need not hold now."""
        return sum(self._hosts[place].numel() for place in range(len(self._offloaded)))

    @torch.no_grad()
    def offload(self) -> None:
        """Begin to take contents to the host; nothing where they are there already."""
        if self._offloaded:
            return
        self.wait()
        self._offloaded = _storages(self._tensors())
        with self._copying():
            for place, storage in enumerate(self._offloaded):
                content = _bytes_of(storage)
                host = self._hosts.get(place)
                if host is None or host.numel() != content.numel():
                    host = torch.empty(
                        content.numel(), dtype=torch.uint8, pin_memory=self._stream is not None
                    )
                    self._hosts[place] = host
                    host.copy_(content, non_blocking=True)
                elif self._changes:
                    host.copy_(content, non_blocking=True)
                if self._stream is not None:
                    content.record_stream(self._stream)
                storage.resize_(0)

    @torch.no_grad()
    def prefetch(self) -> None:
        """Begin to bring contents back, beside the work that follows up to `wait`."""
        for place, storage in enumerate(self._offloaded):
            storage.resize_(self._hosts[place].numel())  # from the memory of the stream that will use it
        with self._copying():
            for place, storage in enumerate(self._offloaded):
                _bytes_of(storage).copy_(self._hosts[place], non_blocking=True)
        self._is_coming = self._is_coming or bool(self._offloaded)
        self._offloaded = []

    def wait(self) -> None:
        """Have the work that follows find the contents on the device."""
        self.prefetch()
        if self._is_coming and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_coming = False

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copy behind the work so far, on a stream of its own where there is one."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return each storage once that has anything in it, in the order of the tensors.

    Memory that numpy has had in its hands, as weights that were read on a CPU, cannot be emptied and stays.
    """
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in found.values() if storage.nbytes() and storage.resizable()]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
