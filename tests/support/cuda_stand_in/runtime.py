"""`torch.cuda` and NCCL of the stand-in; to be imported before torch."""

import contextlib
import ctypes
import functools
import os
import time

from cuda_stand_in import LIBRARY, torch_folder

# torch determines the available devices once, at its import.
for name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.environ[LIBRARY])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402

from cuda_stand_in import attention, graphs, products  # noqa: E402

GIB = 2**30


class Stream:
    """The only stream; work on it is synchronous."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """A point in time."""

    def __init__(self, *_: object, **__: object) -> None:
        self.at_s: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.at_s = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        return (later.at_s - self.at_s) * 1e3

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True


class Properties:
    """Properties of a device that kernels are tuned for."""

    name = "stand-in"
    major, minor = 9, 0
    total_memory = 8 * GIB
    multi_processor_count = 132
    L2_cache_size = 50 * 2**20
    uuid = "stand-in"


def always(answer: object):
    """Return a function with a constant result."""
    return lambda *_, **__: answer


STREAM = Stream()
ANSWERS = {
    "_lazy_init": None,
    "init": None,
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "device_count": 8,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "current_stream": STREAM,
    "default_stream": STREAM,
    "stream": contextlib.nullcontext(),
    "device": contextlib.nullcontext(),
    "get_device_properties": Properties(),
    "get_device_capability": (9, 0),
    "get_device_name": Properties.name,
    "mem_get_info": (4 * GIB, 8 * GIB),
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_reserved": 0,
    "memory_stats": {},
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "ipc_collect": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "graph_pool_handle": (0, 0),
}
for name, answer in ANSWERS.items():
    setattr(torch.cuda, name, always(answer))
torch.cuda.Stream, torch.cuda.Event = Stream, Event
torch.cuda.CUDAGraph, torch.cuda.graph = graphs.Graph, graphs.recording
# Random numbers are drawn by the CPU's generator.
torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
torch.cuda.default_generators = (torch.default_generator,) * 8
torch.Tensor.record_stream = always(None)
torch.version.cuda = "13.0"
INNER_ANSWERS = {
    "_cuda_getDevice": 0,
    "_cuda_setDevice": None,
    "_cuda_exchangeDevice": 0,
    "_cuda_maybeExchangeDevice": 0,
    "_cuda_getCurrentRawStream": 0,
    "_nccl_version": (2 << 32) | (28 << 16) | 9,
    "_nccl_version_suffix": b"",
}
for name, answer in INNER_ANSWERS.items():
    setattr(torch._C, name, always(answer))

_resize_on_host = torch.UntypedStorage.resize_


def resize_(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
    """As `UntypedStorage.resize_`, which refuses such storages without CUDA."""
    if storage.device.type != "cuda":
        return _resize_on_host(storage, num_bytes)
    whole = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)
    torch.ops.cuda_stand_in.resize_storage(whole, num_bytes)
    return storage


torch.UntypedStorage.resize_ = resize_


def with_gloo(function):
    """Return a function that creates gloo process groups where NCCL is requested."""

    @functools.wraps(function)
    def call(*args: object, **options: object):
        options.pop("device_id", None)
        if options.get("backend") == "nccl":
            options["backend"] = "gloo"
        return function(*("gloo" if value == "nccl" else value for value in args), **options)

    return call


for name in ("init_process_group", "new_group"):
    function = with_gloo(getattr(dist, name))
    setattr(dist, name, function)
    setattr(distributed_c10d, name, function)
distributed_c10d.is_nccl_available = dist.is_nccl_available = always(True)

attention.register()
products.register()
graphs.watch_kernels()
