"""Row m: forward and backward on long sequences, and the optimizer's step apart."""

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.harness.next_token_loss import nll_step
from benchmarks.models.sizes import ModelSizes, fill_on_device
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.parts.models import sequence_logprobs
from glm_rlhf.engine.bench.rates import seconds_on_all
from glm_rlhf.engine.observe.mfu import training_flop
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Of the mean loss, relative: sums in another order; bf16 logits rounded at random."""
_REPETITIONS = 10


def training_entries(
    topology: Topology, sizes: ModelSizes, num_layers: int, peak_flop_per_s: float | None
) -> tuple[Entry, Entry]:
    """Return forward + backward of a micro-batch, checked by its loss, and one step of AdamW.

    Args:
        topology: of one rank.
        sizes: of the model and the sequences.
        num_layers: that it is cut to.
        peak_flop_per_s: of the data sheet, what MFU counts by; None where it is not known.
    """
    model = replace(sizes.model, num_layers=num_layers)
    chunks = build_model(model, topology, dtype=sizes.dtype)
    fill_on_device(chunks, seed=1)
    sequences = _sequences(sizes, topology.device)
    expected = -float(
        sequence_logprobs(chunks, [[sequence] for sequence in sequences], topology).float().mean()
    )
    state = TrainingState(chunks, AdamSettings(lr=1e-5), topology=topology)
    work = _work(state, sequences, topology)
    error = abs(work() - expected) / expected
    tolerance = TOLERANCE[sizes.dtype]
    if not error <= tolerance:
        status = f"wrong: the loss is off by {error:.1e}, at most {tolerance:.0e}"
        return Entry(name="ours", error=error, status=status), Entry(name="ours", status="not measured")
    passes = summary(seconds_on_all(work, topology, _REPETITIONS))
    step = summary(seconds_on_all(lambda: _step(state), topology, _REPETITIONS))
    figures = {}
    if peak_flop_per_s is not None:
        figures["MFU %"] = 100 * micro_batch_flop(sizes, num_layers) / passes.median_s / peak_flop_per_s
    num_weights = sum(weight.numel() for chunk in chunks for weight in chunk.parameters())
    return (
        Entry(name="ours", timing=passes, error=error, figures=figures),
        Entry(name="ours", timing=step, figures={"ps a weight": 1e12 * step.median_s / num_weights}),
    )


def micro_batch_flop(sizes: ModelSizes, num_layers: int) -> float:
    """Return the operations of forward and backward over a micro-batch of the cut model."""
    return training_flop(
        replace(sizes.model, num_layers=num_layers),
        num_sequences=sizes.num_sequences,
        mean_tokens=sizes.sequence,
        num_targets=sizes.num_sequences * (sizes.sequence - 1),
    )


def _sequences(sizes: ModelSizes, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (sizes.num_sequences, sizes.sequence)
    return list(torch.randint(0, sizes.model.vocab_size, size, generator=generator).to(device))


def _work(state: TrainingState, sequences: list[torch.Tensor], topology: Topology) -> Callable[[], float]:
    """Return forward and backward over the sequences, which gives the mean loss."""
    packed = pack(sequences)
    step = nll_step([packed], float(sum(len(sequence) - 1 for sequence in sequences)), topology)

    def run() -> float:
        (loss,) = run_micro_batches(state.chunks, [packed], step, topology=topology, forward_only=False)
        return float(loss)

    return run


def _step(state: TrainingState) -> None:
    state.step()
    state.zero_grad()
