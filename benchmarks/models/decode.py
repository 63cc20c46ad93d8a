"""Rows j, k and l: the switch to generation and back, and decode steps over a filled cache.

Steps go the product's way, `GenerationPhase` with its queue, recorded steps and sampler. The phase takes
from outside how decode steps are recorded; here each replay notes when it begins, and from
one replay to the next lies a whole step, the host's part included.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.models.sizes import ModelSizes
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.parts.models import sequence_logprobs
from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase
from glm_rlhf.engine.rollout.scheduling.request_queue import Completion, GenerationRequest
from glm_rlhf.parallel.inference.cuda_graph import BATCH_SIZES, Record, Recording, record_cuda_graph
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.inference.weight_views import chunk_weights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.topology import Topology

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Nats that a sampled token's logprob may lie off a forward pass, on average: bf16 rounds every layer's
residual stream, some hundredths; an answer that reads another one's keys is off by one and more."""
NUM_CHECKED = 4
_REPLAYS, _SWITCHES = 20, 10


def decode_entry(chunks: Sequence[GLMModel], topology: Topology, sizes: ModelSizes, batch: int) -> Entry:
    """Return the time of a decode step of `batch` sequences, checked by a forward pass over whole answers."""
    clock = StepClock(topology.device)
    prompts_BT = decode_prompts(sizes, batch)
    requests = [
        GenerationRequest(
            index=index,
            prompt=tuple(prompt),
            max_new_tokens=sizes.new_tokens,
            stop_ids=frozenset(),
            seed=index,
        )
        for index, prompt in enumerate(prompts_BT.tolist())
    ]
    done: list[Completion] = []
    with phase_of(chunks, topology, sizes, batch, record=clock) as phase:
        for completion in phase.run(requests, SamplingSettings(temperature=1.0)):
            if not done:  # until now every step had all sequences
                steps_s, replays_s = clock.steps_s(batch), clock.replays_s(batch)
            done.append(completion)
    error = _distance(chunks, topology, requests, done)
    tolerance = TOLERANCE[sizes.dtype]
    status = "" if error <= tolerance else f"wrong: logprobs off by {error:.1e}, at most {tolerance:.0e}"
    lengths = [len(completion.tokens) for completion in done]
    if lengths != [sizes.new_tokens] * batch:
        status = f"wrong: {sum(lengths)} tokens came of {batch * sizes.new_tokens}"
    replay = summary(replays_s).median_s
    return Entry(
        name="ours",
        timing=None if status else summary(steps_s),
        error=error,
        figures={
            "replay alone ms": 1e3 * replay,
            "recording ms": 1e3 * clock.recording_s[recorded_rows(batch)],
        },
        status=status,
    )


def switch_entry(chunks: Sequence[GLMModel], topology: Topology, sizes: ModelSizes) -> Entry:
    """Return the time from training to generation and back in one layout: plan, take and give back the cache.

    `moved bytes` are those of weights that generation reads at another address than training's.
    """
    before = {parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    seconds, moved = [], 0

    def switch() -> None:
        with phase_of(chunks, topology, sizes, sizes.batches[0], record=None):
            pass

    for _ in range(_SWITCHES + 1):
        seconds.append(_timed(switch, topology.device)[0])
        read = list(_tensors(chunk_weights(chunks)))
        moved += sum(tensor.nbytes for tensor in read if tensor.data_ptr() not in before)
    after = {parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    is_same = before == after and moved == 0
    return Entry(
        name="ours, equal layouts",
        timing=summary(seconds[1:]) if is_same else None,
        figures={"moved bytes": float(moved)},
        status="" if is_same else "wrong: weights lie elsewhere than before",
    )


def other_layout_entry(topology: Topology) -> Entry:
    """Return the entry of a switch between layouts, which takes several ranks."""
    return Entry(
        name="ours, another layout",
        status=f"not measured: it takes several devices, here is {topology.world_size}",
    )


def decode_prompts(sizes: ModelSizes, batch: int) -> torch.Tensor:
    """Return random prompts, int64 [batch, tokens]: no two share a page."""
    size = (batch, sizes.prompt_of_decode)
    return torch.randint(0, sizes.model.vocab_size, size, generator=torch.Generator().manual_seed(batch))


def phase_of(
    chunks: Sequence[GLMModel], topology: Topology, sizes: ModelSizes, batch: int, *, record: Record | None
) -> GenerationPhase:
    """Return a phase with room for `batch` sequences at their longest."""
    return GenerationPhase(
        chunks,
        topology=topology,
        batch=GenerationSection(
            max_batch=batch, max_step_tokens=sizes.step_tokens, page_size=sizes.page_size
        ),
        longest=sizes.prompt_of_decode + sizes.new_tokens,
        record=record,
    )


def recorded_rows(batch: int) -> int:
    """Return the rows that a step of `batch` sequences is filled up to."""
    return min(size for size in BATCH_SIZES if size >= batch)


class StepClock:
    """Records decode steps as the device does, and notes when each replay of them begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._record = record_cuda_graph if device.type == "cuda" else _RunAgain
        self._recordings: dict[int, Recording] = {}
        self._starts: dict[int, list[float]] = {}
        self.recording_s: dict[int, float] = {}
        """Seconds that a recording took, by its rows."""

    def __call__(self, work: Callable[[], torch.Tensor], pool: Any) -> Recording:
        """Record as the engine does: this is a `Record`."""
        seconds, recording = _timed(lambda: self._record(work, pool), self._device)
        rows = len(recording.output)
        self.recording_s[rows] = seconds
        self._recordings[rows], self._starts[rows] = recording, []
        return _Noted(recording, self._starts[rows])

    def steps_s(self, batch: int) -> list[float]:
        """Return the seconds from each step of so many sequences to the next."""
        return [later - earlier for earlier, later in pairwise(self._starts[recorded_rows(batch)])]

    @torch.inference_mode()
    def replays_s(self, batch: int) -> list[float]:
        """Return the seconds of replays alone: the last step again, each waited for."""
        replay = self._recordings[recorded_rows(batch)].replay
        return [_timed(replay, self._device)[0] for _ in range(_REPLAYS)]


class _Noted:
    """A recording whose replays are noted."""

    def __init__(self, recording: Recording, starts: list[float]) -> None:
        self._recording, self._starts = recording, starts

    @property
    def output(self) -> torch.Tensor:
        return self._recording.output

    def replay(self) -> None:
        self._starts.append(time.perf_counter())
        self._recording.replay()


class _RunAgain:
    """Stands for a CUDA graph where there is none: a replay is the work itself."""

    def __init__(self, work: Callable[[], torch.Tensor], _pool: Any) -> None:
        self._work, self.output = work, work()

    def replay(self) -> None:
        self.output.copy_(self._work())


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of some work, the device waited for on both sides, and its result."""
    _wait(device)
    started = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _distance(
    chunks: Sequence[GLMModel],
    topology: Topology,
    requests: Sequence[GenerationRequest],
    done: Sequence[Completion],
) -> float:
    """Return how many nats sampled tokens' logprobs lie off a training module's forward pass, on average.

    Of some answers, the worst.
    """
    differences = []
    for completion in done[:: max(1, len(done) // NUM_CHECKED)][:NUM_CHECKED]:
        prompt = requests[completion.request].prompt
        tokens_T = torch.tensor((*prompt, *completion.tokens), device=topology.device)
        wanted_T = sequence_logprobs(chunks, [[tokens_T]], topology)[len(prompt) - 1 :]
        logprobs_T = torch.tensor(completion.untempered_logprobs, device=topology.device)
        differences.append(float((logprobs_T - wanted_T.float()).abs().mean()))
    return max(differences)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a chunk's parameters, however they are nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
