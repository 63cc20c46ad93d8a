"""The reward function of a config, with the processes that call it, for the time of a command."""

import contextlib
import os
from collections.abc import Iterator

import torch

from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.rewards.distributed import calls_reward_function
from glm_rlhf.engine.rewards.function import (
    RewardError,
    RewardFunction,
    import_reward_function,
    split_name,
)
from glm_rlhf.engine.rewards.http import HttpReward
from glm_rlhf.engine.rewards.in_process import InProcessReward
from glm_rlhf.engine.rewards.in_worker import WorkerReward, start_workers
from glm_rlhf.engine.rewards.weighted_sum import parse_reward_function
from glm_rlhf.engine.workers.pool import WorkerPool, visible_devices
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology


@contextlib.contextmanager
def open_reward_function(
    section: PPORewardSection, *, topology: Topology, seed: int
) -> Iterator[RewardFunction | None]:
    """Return, as a context manager, the reward function of a config; None if it has none.

    Processes for `module:function` are started on the ranks that call it, and end with the block. Every rank
    of the topology enters.

    Args:
        section: of the config.
        topology: layout and groups.
        seed: of the run.

    Raises:
        RewardError: it cannot be found, or its module cannot be imported; on all ranks.
    """
    names: list[str] = []
    pool: WorkerPool | None = None
    num_workers = max(section.concurrency, 1) if section.workers is None else section.workers
    if num_workers:
        pool = WorkerPool(
            num_workers=num_workers,
            timeout_s=section.function_timeout_s,
            seed=f"{seed} {topology.dp_rank}",
            environment=_devices(topology.device),
        )

    def by_name(name: str) -> RewardFunction:
        if pool is None:
            return InProcessReward(
                import_reward_function(name), name=name, timeout_s=section.function_timeout_s
            )
        module, _ = split_name(name)
        if module == "__main__":
            raise RewardError(
                f"the reward function {name} is in the script that runs, which its processes do not import: "
                "put it in a module, or set reward.workers=0"
            )
        names.append(name)
        return WorkerReward(name=name, pool=pool)

    def over_http(url: str) -> RewardFunction:
        return HttpReward(
            url=url, timeout_s=section.timeout_s, retries=section.retries, batch_size=section.batch_size
        )

    with contextlib.ExitStack() as stack:
        function = None
        with raise_on_all_ranks("finding the reward function"), _traceback_shown(topology):
            if section.function is not None:
                function = parse_reward_function(section.function, over_http=over_http, by_name=by_name)
            if pool is not None and names and calls_reward_function(topology):
                stack.callback(pool.close)
                start_workers(pool, names)
        yield function


@contextlib.contextmanager
def _traceback_shown(topology: Topology) -> Iterator[None]:
    """Show on the main rank where the user's module raised."""
    try:
        yield
    except RewardError as error:
        if error.traceback_text:
            log(error.traceback_text.rstrip(), topology)
        raise


def _devices(device: torch.device) -> dict[str, str]:
    """Return what makes "cuda" in a worker the rank's own device."""
    if device.type != "cuda":
        return {}
    own = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible_devices(own, visible=visible, count=torch.cuda.device_count())}
