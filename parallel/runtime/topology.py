"""Process groups of Megatron-core for a launch by torchrun, by a larger stack, or of one process."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from glm_rlhf.parallel.megatron_compat import cpu_patches, process_groups
from glm_rlhf.parallel.runtime.launch import Launch, read_launch
from glm_rlhf.parallel.runtime.orphans import watch_launcher
from glm_rlhf.parallel.runtime.rendezvous import fresh_name, open_launch_store
from glm_rlhf.parallel.spec.layout import Layout

DEFAULT_TIMEOUT_S = 600.0
NUM_CHANNELS = 4
"""Kinds of messages between two stages: activations and gradients, to the higher and to the lower stage."""
_LIMIT = "parallel.timeout_s"
_world_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This rank's position in the layout, and its process groups."""

    layout: Layout
    """Sizes of the model axes."""
    world_size: int
    """All ranks of the run."""
    rank: int
    """Rank of this process."""
    dp: int
    """Data-parallel size: copies of the model."""
    device: torch.device
    """Device of this rank."""
    tp_group: dist.ProcessGroup
    """Ranks that split the matrices of this rank's layers."""
    pp_group: dist.ProcessGroup
    """Ranks of this rank's pipeline, first stage first."""
    pp_host_group: dist.ProcessGroup
    """The same ranks over gloo, for small tensors that the host reads; `pp_group` itself on a CPU."""
    pp_channels: tuple[dist.ProcessGroup, ...]
    """The same ranks, by the channel of a schedule's messages, see `pipeline.p2p`: `pp_group` where
    tags tell messages apart."""
    cp_group: dist.ProcessGroup
    """Ranks that split this rank's micro-batches."""
    dp_group: dist.ProcessGroup
    """Ranks with the same shard and different micro-batches."""
    dp_cp_group: dist.ProcessGroup
    """Ranks whose gradients of this shard are summed."""

    @property
    def tp_rank(self) -> int:
        """Position on the tensor-parallel axis."""
        return self.tp_group.rank()

    @property
    def pp_rank(self) -> int:
        """Pipeline stage of this rank."""
        return self.pp_group.rank()

    @property
    def cp_rank(self) -> int:
        """Position on the context-parallel axis."""
        return self.cp_group.rank()

    @property
    def dp_rank(self) -> int:
        """Which copy of the model this rank belongs to."""
        return self.dp_group.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers and the head."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.layout.pp - 1)

    @property
    def is_main_rank(self) -> bool:
        """Whether this rank writes to the terminal and to files: rank 0."""
        return self.rank == 0


@contextlib.contextmanager
def open_topology(
    layout: Layout,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    seed: int = 1234,
    check: Callable[[], None] | None = None,
) -> Iterator[Topology]:
    """Return, as a context manager, this rank's topology; every rank of the world must enter.

    An existing process group (of a larger stack) is used and not destroyed. Otherwise one is created from
    torchrun's environment, or for this single process, and destroyed at exit. NCCL is used for CUDA
    tensors, gloo for CPU tensors.

    Args:
        layout: sizes of the model axes.
        timeout_s: seconds after which a collective that some rank never entered fails, and after which ranks
            that have not come are no longer waited for.
        seed: seed of Megatron-core's random state, the same on every rank.
        check: called on every rank of a world of several, before any other group is made; it may communicate.

    Raises:
        Exception: that of `check`.
        ValueError: the layout does not divide the world, another topology is active, a host has more ranks
            than CUDA devices, a launch variable is wrong, or ranks did not come in time.
    """
    if parallel_state.model_parallel_is_initialized():
        raise ValueError("a topology is already active in this process: close it before opening another")
    # Megatron-core overlaps the reductions of tensor parallelism by the order in which kernels are queued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # read when the driver starts
    cpu_patches.install()
    creates_world = not dist.is_initialized()
    if creates_world:
        launch = read_launch()
        watch_launcher()
        _start_world(launch, timeout_s)
    topology = None
    try:
        if check is not None and dist.get_world_size() > 1:
            check()
        topology = _create_groups(layout, timeout_s, seed)
        yield topology
        dist.barrier()  # no rank closes a connection that another rank still reads from
    finally:
        _destroy_groups(topology)
        if creates_world:
            dist.destroy_process_group()


def _start_world(launch: Launch, timeout_s: float) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        local_rank, num_devices = launch.local_rank, torch.cuda.device_count()
        if local_rank >= num_devices:
            raise ValueError(
                f"LOCAL_RANK is {local_rank} on a host with {num_devices} CUDA devices: start at most that "
                "many ranks per host (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    store: dist.Store = dist.HashStore()
    if launch.is_launched:
        store = _rendezvous(timeout_s)
        store.set_timeout(timeout)
    # The store outlives a world and keeps the addresses of its ranks: each world uses its own prefix.
    store = dist.PrefixStore(f"world_{next(_world_numbers)}", store)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )


@functools.cache
def _rendezvous(timeout_s: float) -> dist.Store:
    """Return a fresh prefix of the launcher's store."""
    launch = read_launch()
    store = open_launch_store(launch, timeout_s=timeout_s, limit=_LIMIT)
    name = fresh_name(store, launch.rank, launch.world_size, timeout_s, limit=_LIMIT)
    return dist.PrefixStore(name, store)


def _create_groups(layout: Layout, timeout_s: float, seed: int) -> Topology:
    dp = layout.dp(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        layout=layout,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        dp=dp,
        device=torch.device("cuda", torch.cuda.current_device())
        if not cpu_patches.is_needed()
        else torch.device("cpu"),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        pp_host_group=_host_group(parallel_state.get_pipeline_model_parallel_group(), timeout_s),
        pp_channels=_channels(layout, timeout_s),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _host_group(group: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup:
    """Return a gloo group of the same ranks; every rank of the world calls this."""
    return group if cpu_patches.is_needed() else _group_like(group, timeout_s, backend="gloo")


def _channels(layout: Layout, timeout_s: float) -> tuple[dist.ProcessGroup, ...]:
    """Return the pipeline's groups by channel; every rank of the world calls this.

    NCCL runs the messages of a group between two ranks in the order of the calls, in both directions: a send
    waits for its receive, before which the other rank may have queued a send of its own. So each kind of
    message between two ranks has a group.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if cpu_patches.is_needed() or layout.pp == 1:
        return (group,) * NUM_CHANNELS
    gradients = _group_like(group, timeout_s)
    if layout.pp > 2 or layout.vpp == 1:  # from the last stage to the first is another pair of ranks
        return group, group, gradients, gradients
    return group, _group_like(group, timeout_s), _group_like(group, timeout_s), gradients


def _group_like(group: dist.ProcessGroup, timeout_s: float, backend: str | None = None) -> dist.ProcessGroup:
    """Return another group of the same ranks; every rank of the world calls this."""
    all_ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(all_ranks, dist.get_process_group_ranks(group))
    mine, _ = dist.new_subgroups_by_enumeration(
        sorted(map(list, {tuple(ranks) for ranks in all_ranks})),
        timeout=timedelta(seconds=timeout_s),
        backend=backend,
    )
    return mine


def _destroy_groups(topology: Topology | None) -> None:
    """Reset Megatron-core's global state, and destroy the groups of this process."""
    groups = process_groups.created_groups()
    parallel_state.destroy_model_parallel()
    if topology is not None:
        own = {id(group): group for group in (topology.pp_host_group, *topology.pp_channels)}
        own.pop(id(topology.pp_group), None)
        for group in own.values():
            dist.destroy_process_group(group)
    for group in groups:
        dist.destroy_process_group(group)
