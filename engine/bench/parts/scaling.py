"""A training step on more and more ranks: with work that grows with them, and with work that is shared.

`measure_scaling` runs on the ranks of one world; `launch` starts such a world.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from glm_rlhf.engine.bench.parts.models import next_token_loss
from glm_rlhf.engine.bench.rates import seconds_on_all
from glm_rlhf.engine.bench.sizes import Sizes
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import PackedTokens, pack
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.storage.durable_io import replace_text
from glm_rlhf.parallel.weights.load import randomize_weights

FILE = "scaling.json"
"""Written by each world into its run folder."""
REPETITIONS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint:
    """Steps of one world, as its slowest rank takes them."""

    num_ranks: int
    """Data-parallel ranks."""
    backend: str
    """`gloo` or `nccl`."""
    tokens: int
    """Tokens of a rank in weak scaling, of all ranks together in strong scaling."""
    weak_s: tuple[float, ...]
    """Seconds of each step whose tokens grow with the ranks."""
    strong_s: tuple[float, ...]
    """Seconds of each step whose tokens the ranks share."""


def measure_scaling(sizes: Sizes, topology: Topology) -> ScalingPoint:
    """Return this world's steps: forward, backward, sum of gradients, Adam; every rank calls this."""
    chunks = build_model(sizes.model, topology, dtype=sizes.dtype)
    randomize_weights(chunks, seed=1)
    state = TrainingState(chunks, AdamSettings(lr=1e-5), topology=topology)
    shares = {"weak": sizes.tokens, "strong": sizes.tokens // topology.dp}
    seconds = {}
    for name, tokens in shares.items():
        batch = _batch(sizes, max(1, tokens // sizes.length), topology)
        seconds[name] = seconds_on_all(lambda b=batch: _step(state, b, topology), topology, REPETITIONS)
    return ScalingPoint(
        num_ranks=topology.world_size,
        backend=dist.get_backend(topology.dp_cp_group),
        tokens=sizes.tokens,
        weak_s=tuple(seconds["weak"]),
        strong_s=tuple(seconds["strong"]),
    )


def launch(folder: Path, num_ranks: int, settings: Sequence[str], *, threads: int) -> None:
    """Have so many ranks of this machine measure; torchrun starts them.

    Args:
        folder: run folder of that world.
        num_ranks: processes.
        settings: of `bench`, `section.key=value` each.
        threads: of torch in each.

    Raises:
        RuntimeError: the launch failed; the message has the end of what it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["-m", "glm_rlhf.engine", "bench", f"run.output={folder}", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"bench on {num_ranks} ranks failed: {done.stderr[-2000:]}")


def write_point(point: ScalingPoint, path: Path) -> None:
    """Write the file that `read_point` reads."""
    replace_text(path, json.dumps(asdict(point), indent=1) + "\n")


def read_point(path: Path) -> ScalingPoint:
    """Return the point that a world wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return ScalingPoint(**{name: tuple(v) if isinstance(v, list) else v for name, v in content.items()})


def efficiencies(points: Sequence[ScalingPoint]) -> Mapping[str, list[float]]:
    """Return for each world how much of the ideal it reaches, 1 for the first, of median steps.

    Weak: the first one's step ÷ this one's. Strong: the same times first ranks ÷ these ranks.
    """
    first = points[0]
    weak = [median(first.weak_s) / median(point.weak_s) for point in points]
    strong = [
        median(first.strong_s) / median(point.strong_s) * first.num_ranks / point.num_ranks
        for point in points
    ]
    return {"weak": weak, "strong": strong}


def _batch(sizes: Sizes, num_sequences: int, topology: Topology) -> PackedTokens:
    generator = torch.Generator().manual_seed(topology.rank)
    sequences = torch.randint(
        0, sizes.model.vocab_size, (num_sequences, sizes.length), generator=generator
    ).unbind()
    return pack(sequences).to(topology.device)


def _step(state: TrainingState, batch: PackedTokens, topology: Topology) -> None:
    state.zero_grad()
    step = next_token_loss([batch], float(batch.num_tokens * topology.dp))
    run_micro_batches(state.chunks, [batch], step, topology=topology, forward_only=False)
    state.step()
