"""The rates that `glm-rlhf plan` takes in `cluster.rates`, measured on the machine at hand.

All ranks measure at once, as they work at once in training. Times are those of the engine's own passes on a
model of these widths with one layer and with two, each the fastest of several runs, as the slowest rank
took them: what a layer takes is their difference, what depends on rows the difference of two lengths. Links
have the median of several. Attention counts at the rate of the products; links between nodes at that of the
world that was launched.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from glm_rlhf.engine.bench.full_length import full_length_answers
from glm_rlhf.engine.bench.machine import description, measured_rates
from glm_rlhf.engine.cost.activations import RankMicroBatch
from glm_rlhf.engine.cost.hardware import Rates
from glm_rlhf.engine.cost.pass_time import layer_matrix_elements
from glm_rlhf.engine.rollout.generate import answer_prompts
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.model.glm import GLMModel, build_model
from glm_rlhf.parallel.model.packing import PackedTokens, pack
from glm_rlhf.parallel.model.token_outputs import token_values
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.load import randomize_weights

_LEAST = 1e-9
"""Seconds in place of a remainder that noise made negative."""
_MESSAGES = (2**12, 2**23)
"""Bytes of the small and of the large message."""
_MESSAGES_IN_A_RUN, _PRODUCT = 8, 384
"""How many a run has, and the width of the product before each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of the measured passes."""

    tokens: int
    """Tokens of a long micro-batch; a short one has half."""
    length: int
    """Tokens of a sequence."""
    batch: int
    """Sequences that generate at once."""
    dtype: torch.dtype
    """Of weights and activations."""
    repetitions: int
    """Runs of which the fastest counts."""


def rates_of(model: GLMConfig, size: Size) -> Rates:
    """Return this world's rates; every rank calls this, and all get the same."""
    with open_topology(Layout()) as topology:
        return rates_on(topology, model, size)


def rates_on(topology: Topology, model: GLMConfig, size: Size) -> Rates:
    """Return the rates of the ranks of a plain data-parallel topology; see `rates_of`."""
    device = measured_rates(topology.device)
    itemsize = size.dtype.itemsize
    half = replace(size, tokens=size.tokens // 2)
    forward = {
        (layers, length.tokens): _forward_s(_shallow(model, layers), length, topology)
        for layers in (1, 2)
        for length in (size, half)
    }
    layer_s = _difference(forward, (2, size.tokens), (1, size.tokens))
    half_layer_s = _difference(forward, (2, half.tokens), (1, half.tokens))
    rows_s = max(layer_s - half_layer_s, 0.3 * layer_s)  # of half the rows
    flop_per_s = _flop_rate(model, size, rows_s, device.bytes_per_s)
    both = {layers: _training_s(_shallow(model, layers), size, topology) for layers in (1, 2)}
    step_s, num_weights = _step_s(_shallow(model, 2), size, topology)
    decode = {layers: _decode_s(_shallow(model, layers), size, topology) for layers in (1, 2)}
    products = 2 * size.batch * layer_matrix_elements(model, Layout()) / flop_per_s
    head = 2 * size.batch * model.vocab_size * model.hidden_size / flop_per_s
    moved = layer_matrix_elements(model, Layout()) * itemsize / device.bytes_per_s
    decode_layer_s = decode[2] - decode[1]
    latency_s, link_bytes_per_s = _link(topology, size.repetitions)
    return Rates(
        flop_per_s=flop_per_s,
        attention_flop_per_s=flop_per_s,
        bytes_per_s=device.bytes_per_s,
        node_bytes_per_s=link_bytes_per_s,
        network_bytes_per_s=link_bytes_per_s,
        node_latency_s=latency_s,
        network_latency_s=latency_s,
        layer_s=max(_LEAST, layer_s - 2 * rows_s),
        decode_layer_s=max(_LEAST, decode_layer_s - max(products, moved)),
        pass_s=max(_LEAST, forward[1, size.tokens] - layer_s),
        turn_s=max(_LEAST, decode[1] - decode_layer_s - head),
        step_s=max(_LEAST, step_s - 44 * num_weights / topology.dp / device.bytes_per_s),
        backward_factor=max(0.5, (both[2] - both[1]) / layer_s - 1),
        source=_source(topology),
    )


def _source(topology: Topology) -> str:
    facts = description(topology.device)
    return f"measured on {facts['device']}, {topology.world_size} ranks, {facts['date']}"


def _shallow(model: GLMConfig, num_layers: int) -> GLMConfig:
    return replace(model, num_layers=num_layers)


def _difference(seconds: dict, more: tuple[int, int], less: tuple[int, int]) -> float:
    return max(_LEAST, seconds[more] - seconds[less])


def _flop_rate(model: GLMConfig, size: Size, seconds: float, bytes_per_s: float) -> float:
    """Return the rate at which half of a micro-batch's rows take `seconds` per layer, memory's part aside."""
    rows = size.tokens // 2
    batch = RankMicroBatch(model=model, layout=Layout(), num_tokens=rows, itemsize=size.dtype.itemsize)
    moved_s = (10 * batch.residual_bytes + 6 * batch.gate_bytes) / bytes_per_s
    flop = 2 * rows * layer_matrix_elements(model, Layout())
    flop += 2 * rows * size.length * model.num_heads * model.head_size
    return flop / max(seconds - moved_s, 0.3 * seconds)


def _chunks(model: GLMConfig, size: Size, topology: Topology, role: str) -> list[GLMModel]:
    chunks = build_model(model, topology, role=role, dtype=size.dtype)
    randomize_weights(chunks, seed=1)
    return chunks


def _batches(model: GLMConfig, size: Size, topology: Topology, count: int = 1) -> list[PackedTokens]:
    tokens = torch.randint(0, model.vocab_size, (size.length,), generator=torch.Generator().manual_seed(3))
    return [pack([tokens] * (size.tokens // size.length)).to(topology.device) for _ in range(count)]


def _forward_s(model: GLMConfig, size: Size, topology: Topology) -> float:
    chunks = _chunks(model, size, topology, "critic")
    batches = _batches(model, size, topology)

    def step(chunk: GLMModel, hidden_TD: torch.Tensor, _index: int) -> tuple[None, torch.Tensor]:
        return None, token_values(chunk, hidden_TD)

    def work() -> None:
        run_micro_batches(chunks, batches, step, topology=topology, forward_only=True)

    return least_s(work, topology, size.repetitions)


def _training_s(model: GLMConfig, size: Size, topology: Topology) -> float:
    """Return forward and backward of one micro-batch: the difference of two and one."""
    state = TrainingState(_chunks(model, size, topology, "critic"), AdamSettings(lr=1e-5), topology=topology)
    seconds = []
    for count in (1, 2):
        batches = _batches(model, size, topology, count)
        seconds.append(least_s(lambda b=batches: _train(state, b, topology), topology, size.repetitions))
    return max(_LEAST, seconds[1] - seconds[0])


def _train(state: TrainingState, batches: Sequence[PackedTokens], topology: Topology) -> None:
    def step(chunk: GLMModel, hidden_TD: torch.Tensor, _index: int) -> tuple[torch.Tensor, None]:
        return token_values(chunk, hidden_TD).sum(), None

    run_micro_batches(state.chunks, batches, step, topology=topology, forward_only=False)


def _step_s(model: GLMConfig, size: Size, topology: Topology) -> tuple[float, int]:
    """Return one optimizer step without passes, and the weights of the model."""
    state = TrainingState(_chunks(model, size, topology, "critic"), AdamSettings(lr=1e-5), topology=topology)
    _train(state, _batches(model, size, topology), topology)

    def work() -> None:
        state.step()
        state.zero_grad()

    count = sum(p.numel() for chunk in state.chunks for p in chunk.parameters())
    return least_s(work, topology, size.repetitions), count


def _decode_s(model: GLMConfig, size: Size, topology: Topology) -> float:
    """Return one token of `batch` sequences: the difference of a long and a short answer, per token."""
    chunks = _chunks(model, size, topology, "policy")
    prompts = [PromptInput(tokens=(1,) * (size.length // 2), extra={})] * size.batch
    seconds = {}
    for new in (4, 20):
        settings = full_length_answers(new_tokens=new, max_batch=size.batch, max_step_tokens=2**16)
        work = partial(answer_prompts, chunks, prompts, settings, seed=1, topology=topology, is_share=True)
        seconds[new] = least_s(work, topology, size.repetitions)
    return max(_LEAST, (seconds[20] - seconds[4]) / 16)


def _link(topology: Topology, repetitions: int) -> tuple[float, float]:
    """Return latency and bandwidth of an all-reduce over all ranks; of one rank alone, of nothing.

    As layers have them, between products: threads that pass messages on sleep meanwhile, and have to wake.
    """
    count = topology.world_size
    if count == 1:
        return _LEAST, 1e15
    factor_DD = torch.rand(_PRODUCT, _PRODUCT, device=topology.device)

    def alternate(tensor: torch.Tensor | None) -> None:
        for _ in range(_MESSAGES_IN_A_RUN):
            torch.mm(factor_DD, factor_DD)
            if tensor is not None:
                dist.all_reduce(tensor)

    tensors = [None, *(torch.zeros(num_bytes // 4, device=topology.device) for num_bytes in _MESSAGES)]
    alone_s, *with_s = (
        median(seconds_on_all(partial(alternate, tensor), topology, 2 * repetitions)) for tensor in tensors
    )
    small_s, large_s = (max(_LEAST, (seconds - alone_s) / _MESSAGES_IN_A_RUN) for seconds in with_s)
    moved = 2 * (_MESSAGES[1] - _MESSAGES[0]) * (count - 1) / count
    return small_s, moved / max(_LEAST, large_s - small_s)


def seconds_on_all(work: Callable[[], None], topology: Topology, repetitions: int) -> list[float]:
    """Return the seconds of several runs, each as long as its slowest rank takes; every rank calls this."""
    seconds = []
    for _ in range(repetitions + 1):  # the first warms up
        dist.barrier()
        started = time.perf_counter()
        work()
        if topology.device.type == "cuda":
            torch.cuda.synchronize(topology.device)
        taken = torch.tensor([time.perf_counter() - started], device=topology.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        seconds.append(float(taken))
    return seconds[1:]


def least_s(work: Callable[[], None], topology: Topology, repetitions: int) -> float:
    """Return the fastest of several runs, as `seconds_on_all` takes them."""
    return min(seconds_on_all(work, topology, repetitions))
