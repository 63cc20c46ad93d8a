"""Forward and backward on sequences of different lengths: our packed streams against transformers' padding.

python -m benchmarks.training.sequences
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch

from benchmarks.harness.command import Benchmark
from benchmarks.harness.next_token_loss import nll_step
from benchmarks.harness.peer_model import SHAPE, random_glm, shape_text
from benchmarks.harness.thread_counts import at_thread_counts, thread_options, threads_text
from benchmarks.training.padding import padding_share
from glm_rlhf.engine.bench.harness import Contender, Problem, measure
from glm_rlhf.engine.bench.parts.transformers_peer import padded
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

NUM_SEQUENCES, BATCH = 16, 8
TARGET_RATIO = 1.5
# fp32 sums in another order, over four layers: 1e-6; a sequence that sees another one gives 1e-2.
TOLERANCE = 1e-4
_COMMAND = "python -m benchmarks.training.sequences"
WARM_UP_RUNS = 1  # a run takes about a second: caches are warm after one


def mixes() -> dict[str, list[int]]:
    """Return the lengths in tokens of each mix, in the order in which a shuffled data set gives them.

    A mix holds the quantiles of its distribution: a random draw of so few lengths could miss its tail.
    """
    quantiles = [(index + 0.5) / NUM_SEQUENCES for index in range(NUM_SEQUENCES)]
    order = torch.randperm(NUM_SEQUENCES, generator=torch.Generator().manual_seed(3)).tolist()
    tail = [round(50 * math.exp(0.9 * NormalDist().inv_cdf(quantile))) for quantile in quantiles]
    uniform = [round(24 + (192 - 24) * quantile) for quantile in quantiles]
    return {
        "long tail (log-normal, median 50 tokens, sigma 0.9)": [tail[index] for index in order],
        "uniform, 24 to 192 tokens": [uniform[index] for index in order],
        "equal, 96 tokens (nothing to pad)": [96] * NUM_SEQUENCES,
    }


def measure_rows(threads: int, budget_s: float) -> list[Row]:
    """Return one row per mix, in this process with its thread count."""
    peer_model = random_glm(SHAPE).train()
    with tempfile.TemporaryDirectory() as folder, open_topology(Layout()) as topology:
        peer_model.save_pretrained(folder)
        chunks, _ = load_model(folder, topology, dtype=torch.float32)
        state = TrainingState(chunks, AdamSettings(lr=1e-4), topology=topology)
        return [
            Row(
                row=threads_text(threads),
                what=name,
                shape=_shape_text(lengths),
                command=f"{_COMMAND} --threads {threads} --budget-s {budget_s:g}",
                entries=measure(
                    _problem(state, peer_model, lengths, topology),
                    device=torch.device("cpu"),
                    budget_s=budget_s,
                    warm_up_runs=WARM_UP_RUNS,
                ),
                work=(float(sum(lengths)), "tokens"),
            )
            for name, lengths in mixes().items()
        ]


def verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of the rows on the target, a sentence per mix."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        engine, peer, *_ = row.entries
        if engine.timing is None or peer.timing is None:
            return f"Not shown: {engine.status or peer.status} ({row.what})."
        mix = row.what.partition(",")[0].partition(" (")[0]
        ratios.setdefault(mix, []).append(peer.timing.median_s / engine.timing.median_s)
    sentences = []
    for mix, of_mix in ratios.items():
        figures = " and ".join(f"{ratio:.2f}" for ratio in of_mix)
        # Where nothing is padded there is nothing to win: that row says what packing costs.
        judged = "" if mix == "equal" else (" (met)" if min(of_mix) >= TARGET_RATIO else " (missed)")
        sentences.append(f"{mix}: {figures} ×{judged}.")
    return " ".join(sentences)


def _problem(
    state: TrainingState, peer_model: torch.nn.Module, lengths: Sequence[int], topology: Topology
) -> Problem:
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]
    num_targets = sum(lengths) - len(lengths)
    batches = [sequences[i : i + BATCH] for i in range(0, len(sequences), BATCH)]
    contenders = [
        Contender(name="ours, packed", run=_packed(state, sequences, num_targets, topology)),
        Contender(name="transformers, padded", run=_padded(peer_model, batches, num_targets)),
    ]
    if len(set(lengths)) > 1:
        ordered = sorted(sequences, key=len)
        batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
        grouped = _padded(peer_model, batches, num_targets)
        contenders.append(Contender(name="transformers, padded, sorted", run=grouped))
    return Problem(
        contenders=contenders,
        expected=lambda: [t.clone() for t in _padded(peer_model, [[s] for s in sequences], num_targets)()],
        tolerance=TOLERANCE,
    )


def _packed(
    state: TrainingState, sequences: Sequence[torch.Tensor], num_targets: int, topology: Topology
) -> Callable[[], list[torch.Tensor]]:
    batches = [pack(sequences[i : i + BATCH]) for i in range(0, len(sequences), BATCH)]
    step = nll_step(batches, float(num_targets), topology)

    def run() -> list[torch.Tensor]:
        state.zero_grad()
        losses = run_micro_batches(state.chunks, batches, step, topology=topology, forward_only=False)
        model = state.chunks[0].module
        weights = (
            model.embedding.word_embeddings.weight,
            model.decoder.layers[0].mlp.linear_fc2.weight,
            model.output_layer.weight,
        )
        return [torch.stack(losses).sum(), *(weight.main_grad for weight in weights)]

    return run


def _padded(
    model: torch.nn.Module, batches: Sequence[Sequence[torch.Tensor]], num_targets: int
) -> Callable[[], list[torch.Tensor]]:
    inputs = []
    for batch in batches:
        tokens, mask = padded(batch)
        labels = tokens.masked_fill(mask == 0, -100)
        inputs.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})

    def run() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        losses = []
        for batch in inputs:
            loss = model(**batch, use_cache=False, num_items_in_batch=num_targets).loss
            loss.backward()
            losses.append(loss.detach())
        weights = (
            model.model.embed_tokens.weight,
            model.model.layers[0].mlp.down_proj.weight,
            model.lm_head.weight,
        )
        return [torch.stack(losses).sum(), *(weight.grad for weight in weights)]

    return run


def _shape_text(lengths: Sequence[int]) -> str:
    def padding(ordered: Sequence[int]) -> str:
        return f"{padding_share([ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]):.0%}"

    return (
        f"{sum(lengths)} tokens, longest {max(lengths)}, padding {padding(lengths)}, "
        f"sorted {padding(sorted(lengths))}"
    )


BENCHMARK = Benchmark(
    doc=__doc__,
    name="training_cpu",
    title="Forward + backward on variable-length batches, CPU",
    options=thread_options(budget_s=6.0),
    measure=at_thread_counts(measure_rows),
    verdict=verdict,
    claim=lambda verdict: (
        f"Target: at least {TARGET_RATIO} × transformers with padding, on batches that need padding. "
        f"Measured, by thread count: {verdict}"
    ),
    notes=(
        f"model: GLM of {shape_text(SHAPE)}; fp32; the same weights, sequences and thread count for all "
        "contenders",
        f"a run: {NUM_SEQUENCES} sequences in batches of {BATCH}; clear gradients, forward, next-token "
        "loss over all tokens, backward; no optimizer step. tokens/s counts real tokens, not padding",
        "transformers: GlmForCausalLM, its default attention (sdpa), right padding, attention mask, "
        "labels -100. `sorted` has the batches made of neighbours in length, as group_by_length does",
        "checked before timing: loss and three gradients against each sequence run alone",
    ),
)

if __name__ == "__main__":
    BENCHMARK.run()
