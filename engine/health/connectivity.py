"""Whether the ranks of a launch reach each other, tested within a time limit.

Results are exchanged through the launch's key-value store, not through the collectives under test: a rank
that cannot reach the others still reports why.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from glm_rlhf.engine.health.survey import Collective
from glm_rlhf.parallel.runtime.launch import Launch, read_launch
from glm_rlhf.parallel.runtime.rendezvous import open_launch_store

_WARM_UPS = 1


def join(launch: Launch, timeout_s: float) -> dist.Store:
    """Return the key-value store of a launch, from the launcher's environment; every rank calls this.

    Raises:
        ValueError: the environment does not give the rendezvous address, or nothing answers there within
            `timeout_s` seconds.
    """
    store = open_launch_store(launch, timeout_s=timeout_s, limit="doctor.timeout_s")
    return dist.PrefixStore("glm-rlhf/doctor", store)


def try_collectives(
    store: dist.Store, *, rank: int, world_size: int, timeout_s: float
) -> tuple[Collective, ...]:
    """Return the outcome of a small all-reduce over all ranks, for each backend; every rank calls this.

    gloo is always tested, NCCL if there are CUDA devices. A collective that fails raises nothing.
    """
    backends = ["gloo"]
    if torch.cuda.is_available() and dist.is_nccl_available():
        backends.append("nccl")
    return tuple(
        within(
            lambda backend=backend: _all_reduce(backend, store, rank, world_size, timeout_s),
            backend=backend,
            # The backend's own timeout should come first: its message says more.
            timeout_s=1.5 * timeout_s + 1.0,
        )
        for backend in backends
    )


def exchange(
    store: dist.Store, text: str, *, rank: int, world_size: int, timeout_s: float
) -> list[str | None]:
    """Return all ranks' texts on rank 0, None for a rank that is late; an empty list on other ranks."""
    store.set(f"rank/{rank}", text)
    if rank != 0:
        return []
    deadline = time.monotonic() + timeout_s
    return [_get(store, f"rank/{other}", deadline) for other in range(world_size)]


def within(check: Callable[[], str], *, backend: str, timeout_s: float) -> Collective:
    """Return the outcome of a check, which fails if it takes longer than `timeout_s`.

    The check runs in its own thread, which is abandoned if it hangs: a communicator that waits for a peer
    cannot be interrupted.
    """
    outcome: list[Collective] = []

    def run() -> None:
        try:
            outcome.append(Collective(backend=backend, is_ok=True, detail=check()))
        except Exception as error:  # whatever a backend raises is the finding
            detail = " ".join(str(error).split())[:300] or type(error).__name__
            outcome.append(Collective(backend=backend, is_ok=False, detail=detail))

    thread = threading.Thread(target=run, name=f"doctor-{backend}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if outcome:
        return outcome[0]
    return Collective(backend=backend, is_ok=False, detail=f"no answer in {timeout_s:g} s")


def _all_reduce(backend: str, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    timeout = timedelta(seconds=timeout_s)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", read_launch().local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(backend, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        for _ in range(_WARM_UPS + 1):
            values = torch.full((1024,), float(rank), device=device)
            start = time.perf_counter()
            dist.all_reduce(values, async_op=True).wait(timeout)
            total = values[-1].item()
            milliseconds = 1e3 * (time.perf_counter() - start)
    finally:
        dist.destroy_process_group()
    expected = world_size * (world_size - 1) / 2
    if total != expected:
        raise RuntimeError(f"the sum over ranks is {total}, it should be {expected}")
    return f"{milliseconds:.2f} ms for 4 KB"


def _get(store: dist.Store, key: str, deadline: float) -> str | None:
    left_s = max(deadline - time.monotonic(), 0.01)
    try:
        store.wait([key], timedelta(seconds=left_s))
    except RuntimeError:  # torch.distributed.DistStoreError: not there in time
        return None
    return store.get(key).decode()
