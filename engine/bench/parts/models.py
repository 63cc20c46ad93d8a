"""Rows of a whole model: forward, backward and answers, against transformers on the same weights."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from glm_rlhf.engine.bench.full_length import full_length_answers
from glm_rlhf.engine.bench.harness import Answer, Contender, Problem, measure
from glm_rlhf.engine.bench.parts.transformers_peer import TransformersModel, load_transformers
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.bench.sizes import Sizes
from glm_rlhf.engine.rollout.generate import answer_prompts
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.model.glm import GLMModel, build_model
from glm_rlhf.parallel.model.packing import PackedTokens, pack
from glm_rlhf.parallel.model.token_outputs import next_tokens, token_logprobs
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import randomize_weights

# fp32 sums in another order over a few layers: 1e-6. bf16: logits rounded at 2⁻⁸.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# How far below the best logprob a greedy token may lie: ties in fp32, roundings of logits in bf16.
GREEDY_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class Policy:
    """A policy with random weights on this rank, and the same one in transformers."""

    def __init__(self, sizes: Sizes, topology: Topology, *, with_transformers: bool) -> None:
        """Build ours; where `with_transformers`, load its export into transformers' class."""
        self.sizes, self.topology = sizes, topology
        self.chunks = build_model(sizes.model, topology, dtype=sizes.dtype)
        randomize_weights(self.chunks, seed=1)
        self.transformers: TransformersModel | str = "not in bench.against"
        if with_transformers:
            with tempfile.TemporaryDirectory() as folder:
                export_model(self.chunks, Path(folder) / "policy", topology=topology)
                self.transformers = load_transformers(Path(folder) / "policy", sizes.dtype, topology.device)

    def contenders(
        self, engine: Contender, make: Callable[[TransformersModel], tuple[Callable[[], Any], Any]]
    ) -> list[Contender]:
        """Return ours, and transformers' by the `(run, answer)` of `make`."""
        name = "transformers, padded"
        if isinstance(self.transformers, str):
            return [engine, Contender(name=name, run=lambda: None, absent=self.transformers)]
        run, answer = make(self.transformers)
        return [engine, Contender(name=name, run=run, answer=answer)]


def model_rows(policy: Policy, *, budget_s: float, command: str) -> list[Row]:
    """Return forward, and forward with backward, on sequences of different lengths."""
    sizes, topology = policy.sizes, policy.topology
    generator = torch.Generator().manual_seed(7)
    sequences = [
        torch.randint(0, sizes.model.vocab_size, (length,), generator=generator).to(topology.device)
        for length in sizes.lengths
    ]
    batches = [sequences[i : i + sizes.batch] for i in range(0, len(sequences), sizes.batch)]
    num_tokens = sum(sizes.lengths)
    padded = sum(max(map(len, batch)) * len(batch) for batch in batches)
    shape = (
        f"{num_tokens} tokens in {len(sequences)} sequences, longest {max(sizes.lengths)}, padding "
        f"{1 - num_tokens / padded:.0%}"
    )

    def row(name: str, what: str, problem: Problem) -> Row:
        entries = measure(problem, device=topology.device, budget_s=budget_s, warm_up_runs=1)
        return Row(
            row=name, what=what, shape=shape, command=command, entries=entries, work=(num_tokens, "tokens")
        )

    forward = Problem(
        contenders=policy.contenders(
            Contender(name="ours, packed", run=lambda: [sequence_logprobs(policy.chunks, batches, topology)]),
            lambda model: (lambda: model.logprobs(batches), None),
        ),
        expected=lambda: [
            sequence_logprobs(policy.chunks, [[sequence] for sequence in sequences], topology).float()
        ],
        tolerance=TOLERANCE[sizes.dtype],
    )
    rows = [row("forward", "logprob of every token, no gradients", forward)]
    state = TrainingState(policy.chunks, AdamSettings(lr=1e-5), topology=topology)
    both = Problem(
        contenders=policy.contenders(
            Contender(name="ours, packed", run=lambda: _gradient(state, batches, num_tokens, topology)),
            lambda model: (lambda: model.gradient(batches, num_tokens), None),
        ),
        expected=lambda: [
            tensor.clone() for tensor in _gradient(state, [[s] for s in sequences], num_tokens, topology)
        ],
        tolerance=TOLERANCE[sizes.dtype],
    )
    rows.append(row("training", "next-token loss; forward + backward, gradients cleared before", both))
    return rows


def generation_row(policy: Policy, *, budget_s: float, command: str) -> Row:
    """Return greedy answers of one length; checked by how likely each token is in a forward pass."""
    sizes, topology = policy.sizes, policy.topology
    generator = torch.Generator().manual_seed(5)
    size = (sizes.num_prompts, sizes.prompt_tokens)
    prompts_BT = torch.randint(0, sizes.model.vocab_size, size, generator=generator)
    prompts = [PromptInput(tokens=tuple(prompt), extra={}) for prompt in prompts_BT.tolist()]
    settings = full_length_answers(
        new_tokens=sizes.new_tokens, max_batch=sizes.num_prompts, max_step_tokens=8192, temperature=0.0
    )

    def generate() -> Rollouts:
        return answer_prompts(policy.chunks, prompts, settings, seed=1, topology=topology)

    def whole(rollouts: Rollouts) -> Answer:
        starts, order = rollouts.starts, torch.tensor(rollouts.indices).argsort()
        rows = [rollouts.tokens_T[start : start + rollouts.lengths[0]] for start in starts[:-1]]
        return [torch.stack(rows)[order]]

    def gap(answer: Answer, _expected: Answer | None) -> float:
        (tokens_BT,) = answer
        if tokens_BT.shape != (size[0], size[1] + sizes.new_tokens):
            return math.inf
        return _greedy_gap(policy, tokens_BT.to(topology.device), size[1])

    problem = Problem(
        contenders=policy.contenders(
            Contender(name="ours, continuous", run=generate, answer=whole),
            lambda model: (lambda: model.answers(prompts_BT, sizes.new_tokens), None),
        ),
        expected=None,
        tolerance=GREEDY_GAP[sizes.dtype],
        error=gap,
    )
    return Row(
        row="generation",
        what="greedy answers of one length",
        shape=f"{size[0]} prompts of {size[1]} tokens, {sizes.new_tokens} new tokens each",
        command=command,
        entries=measure(problem, device=topology.device, budget_s=budget_s, warm_up_runs=1),
        work=(float(size[0] * sizes.new_tokens), "tokens"),
    )


def next_token_loss(
    batches: Sequence[PackedTokens], denominator: float
) -> Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the step of `run_micro_batches` whose loss is -logprob summed over tokens ÷ `denominator`."""
    targets = [next_tokens(batch) for batch in batches]

    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_T, _ = token_logprobs(model, hidden_TD, targets[index])
        loss = -logprobs_T.sum() / denominator
        return loss, loss.detach()

    return step


def sequence_logprobs(
    chunks: Sequence[GLMModel], batches: Sequence[Sequence[torch.Tensor]], topology: Topology
) -> torch.Tensor:
    """Return the logprob of every token but each sequence's first; a list of sequences is a micro-batch."""
    packed = [pack(batch) for batch in batches]
    targets = [next_tokens(batch) for batch in packed]

    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[None, torch.Tensor]:
        logprobs_T, _ = token_logprobs(model, hidden_TD, targets[index])
        return None, logprobs_T[targets[index] >= 0]

    return torch.cat(run_micro_batches(chunks, packed, step, topology=topology, forward_only=True))


def _gradient(
    state: TrainingState, batches: Sequence[Sequence[torch.Tensor]], denominator: float, topology: Topology
) -> list[torch.Tensor]:
    state.zero_grad()
    packed = [pack(batch) for batch in batches]
    step = next_token_loss(packed, denominator)
    losses = run_micro_batches(state.chunks, packed, step, topology=topology, forward_only=False)
    (model,) = state.bare_chunks
    return [torch.stack(losses).sum(), model.embedding.word_embeddings.weight.main_grad]


def _greedy_gap(policy: Policy, tokens_BT: torch.Tensor, num_prompt: int) -> float:
    """Return how far below the best logprob that of an answer's token lies, at most."""
    gaps = []

    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[None, None]:
        rows_TD = hidden_TD[num_prompt - 1 : -1]
        logits_TV = torch.nn.functional.linear(rows_TD, model.output_weight_VD).float()
        sampled_T = logits_TV.gather(1, tokens_BT[index, num_prompt:, None]).squeeze(1)
        gaps.append(float((logits_TV.amax(1) - sampled_T).max()))
        return None, None

    batches = [pack([row_T]) for row_T in tokens_BT]
    run_micro_batches(policy.chunks, batches, step, topology=policy.topology, forward_only=True)
    return max(gaps)
