"""A function on every stage of a pipeline, each stage a process of its own."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.fresh_process import in_fresh_process
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


def on_stages(function: Callable[..., Any], num_stages: int, *arguments: Any) -> list[Any]:
    """Return `function(topology, *arguments)` of each stage, from the first; one thread per stage, on gloo.

    The function is of a module's top level; it, its arguments and its results are pickled.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_stages) as pool:
        calls = [(function, rank, num_stages, f"{folder}/store", arguments) for rank in range(num_stages)]
        return list(pool.map(lambda call: in_fresh_process(_on_stage, *call), calls))


def _on_stage(
    function: Callable[..., Any], rank: int, num_stages: int, store: str, arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=num_stages)
    with open_topology(Layout(pp=num_stages)) as topology:
        result = function(topology, *arguments)
    dist.destroy_process_group()
    return result
