"""Memory of training steps: the optimizer in backward against one with a gradient buffer.

python -m benchmarks.training.optimizer_memory
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness.command import Benchmark
from benchmarks.harness.next_token_loss import nll_step
from benchmarks.harness.thread_counts import with_threads
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.memory import LiveGradients, held_and_peak_bytes
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.bench.sizes import SMALL
from glm_rlhf.parallel.model.glm import GLMModel, build_model
from glm_rlhf.parallel.model.packing import PackedTokens, pack
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import randomize_weights

CONFIG = replace(
    SMALL, num_layers=8, hidden_size=512, num_heads=8, ffn_size=1408, max_positions=256, init_std=0.02
)
NUM_TOKENS = 64
CONTENDERS = {"in backward": True, "gradient buffer": False}


def measure_rows() -> list[Row]:
    """Return one row for a single micro-batch per step, and one for several."""
    with open_topology(Layout()) as topology:
        return [_row(num, topology) for num in (1, 4)]


def claim(verdict: str) -> str:
    """Return what the optimizer in backward is to save, and the verdict."""
    with open_topology(Layout()) as topology:
        (model,) = _model(topology)
        sizes = [4 * sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers]
        whole = 4 * sum(p.numel() for p in model.parameters())
    bucket = max(*sizes, 4 * CONFIG.vocab_size * CONFIG.hidden_size)
    return (
        f"With one micro-batch a step the optimizer in backward holds one bucket of gradient, here "
        f"{bucket / 1e6:.1f} MB of the whole gradient's {whole / 1e6:.1f} MB; with several, the sums of the "
        f"earlier ones have to wait, and its peak is no lower. Measured: {verdict}"
    )


def verdict(rows: Sequence[Row]) -> str:
    """Return the peaks of each row."""
    sentences = []
    for row in rows:
        engine, other = row.entries
        sentences.append(
            f"{row.what}: {engine.figures['gradient MB']:.1f} MB of gradient at most, against "
            f"{other.figures['gradient MB']:.1f}; {engine.figures['peak MB']:.0f} MB of everything at most, "
            f"against {other.figures['peak MB']:.0f}."
        )
    return " ".join(sentences)


def _row(num_micro_batches: int, topology: Topology) -> Row:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG.vocab_size, (num_micro_batches, NUM_TOKENS), generator=generator)
    batches = [pack([row]) for row in tokens]
    weights, entries = [], []
    for name, in_backward in CONTENDERS.items():
        trained: list[GLMModel] = []
        held, peak = held_and_peak_bytes(partial(_train, trained, batches, in_backward, topology))
        live = LiveGradients(_model(topology)[0])
        state = _train([live.model], batches, in_backward, topology)
        live_bytes = live.peak + _buffer_bytes(state)
        weights.append(torch.cat([p.detach().flatten() for p in trained[0].parameters()]))
        sizes = {"gradient MB": live_bytes, "MB between steps": held, "peak MB": peak}
        error = float((weights[-1] - weights[0]).abs().max())
        entries.append(
            Entry(
                name=name,
                error=error,
                figures={figure: num_bytes / 1e6 for figure, num_bytes in sizes.items()},
                status="" if error <= 1e-6 else "wrong: weights differ",
            )
        )
    text = f"{num_micro_batches} micro-batch{'es' * (num_micro_batches > 1)}"
    return Row(
        row=text,
        what=f"{text} a step",
        shape=f"{num_micro_batches} × {NUM_TOKENS} tokens",
        command="python -m benchmarks.training.optimizer_memory",
        entries=entries,
    )


def _model(topology: Topology) -> list[GLMModel]:
    chunks = build_model(CONFIG, topology, role="policy", dtype=torch.float32)
    randomize_weights(chunks, seed=7)
    return chunks


def _train(
    chunks: list[GLMModel], batches: Sequence[PackedTokens], in_backward: bool, topology: Topology
) -> AnyTrainingState:
    """Train a model for two steps; a new one, put into `chunks`, where there is none."""
    chunks += [] if chunks else _model(topology)
    # Adam divides a gradient by its size: with a large epsilon roundings of it stay roundings.
    settings = AdamSettings(lr=1e-3, epsilon=1.0, clip_grad=0.0)
    state = training_state(chunks, settings, topology=topology, in_backward=in_backward)
    step = nll_step(batches, float(len(batches) * NUM_TOKENS), topology)

    def loss(*micro_batch: Any) -> tuple[torch.Tensor, None]:
        return step(*micro_batch)[0], None  # no loss is kept: it would count

    for _ in range(2):
        state.zero_grad()
        run_micro_batches(state.chunks, batches, loss, topology=topology, forward_only=False)
        state.step()
    return state


def _buffer_bytes(state: AnyTrainingState) -> int:
    """Return the bytes of the gradient buffers that a state keeps."""
    chunks = state.chunks if isinstance(state, TrainingState) else []
    return sum(buffer.grad_data.nbytes for chunk in chunks for buffer in chunk.buffers)


BENCHMARK = Benchmark(
    doc=__doc__,
    name="optimizer_memory_cpu",
    title="Training steps without a gradient buffer, CPU",
    measure=lambda _options: with_threads(1, measure_rows),
    verdict=verdict,
    claim=claim,
    notes=(
        f"model: GLM of {CONFIG.num_layers} layers, hidden {CONFIG.hidden_size}, ffn {CONFIG.ffn_size}, "
        f"vocabulary {CONFIG.vocab_size}, fp32; AdamW, no clipping; one rank; two steps of forward, "
        "next-token loss, backward, optimizer",
        "gradient MB: the most bytes alive at once of gradients that parameters were given, and of their "
        "buffers",
        "other MB: every allocation of torch from before the model is made; weights and moments are 3 "
        "times the whole gradient's size. The peak with a gradient buffer lies in torch's AdamW, whose "
        "temporaries are as large as the model",
        "checked: the weights after two steps are those of the other contender",
    ),
)

if __name__ == "__main__":
    BENCHMARK.run()
