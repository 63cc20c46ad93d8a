"""Contents of tensors wait in host memory while a phase does not need them, and their device memory is free.

Parking copies a storage to the host and empties it; filling it again gives it an address that may be another.
The tensors over it stay the objects that they are, and are of no use in between. On CUDA both copies run on
a stream of their own, between device and pinned memory, and the host waits for none: what is parked is free
when it is copied, and what comes back is waited for by the work that uses it. On a CPU the same is done at
once: it gains nothing there, and is tested there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch


class Parking:
    """Owns the host's copies of some tensors, and knows whether the device has their contents."""

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], *, device: torch.device, changes: bool = True
    ) -> None:
        """Park nothing yet.

        Args:
            tensors: gives what is to be parked, asked each time, for some may come later; storages are parked
                whole, with whatever else lies in them.
            device: where they are.
            changes: whether their contents change when they are not parked; what does not is copied once.
        """
        self._tensors, self._changes = tensors, changes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hosts: dict[int, torch.Tensor] = {}  # by the place among the storages
        self._parked: list[torch.UntypedStorage] = []
        self._is_coming = False

    @property
    def parked_bytes(self) -> int:
        """What the device need not hold now."""
        return sum(self._hosts[place].numel() for place in range(len(self._parked)))

    @torch.no_grad()
    def park(self) -> None:
        """Begin to take contents to the host; nothing where they are there already."""
        if self._parked:
            return
        self.wait()
        self._parked = _storages(self._tensors())
        with self._copying():
            for place, storage in enumerate(self._parked):
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
    def begin_return(self) -> None:
        """Begin to bring contents back, beside the work that follows up to `wait`."""
        for place, storage in enumerate(self._parked):
            storage.resize_(self._hosts[place].numel())  # from the memory of the stream that will use it
        with self._copying():
            for place, storage in enumerate(self._parked):
                _bytes_of(storage).copy_(self._hosts[place], non_blocking=True)
        self._is_coming = self._is_coming or bool(self._parked)
        self._parked = []

    def wait(self) -> None:
        """Have the work that follows find the contents on the device."""
        self.begin_return()
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
