"""Training steps of a reward model on pairs as long as hh-rlhf's: our packed streams against padding.

python -m benchmarks.training.reward_model
"""

import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from benchmarks.harness import peer_model
from benchmarks.harness.command import Benchmark
from benchmarks.harness.peer_model import random_glm, shape_text
from benchmarks.harness.thread_counts import at_thread_counts, thread_options, threads_text
from benchmarks.training.padding import padding_share
from glm_rlhf.engine.bench.harness import Answer, Contender, Problem, measure
from glm_rlhf.engine.bench.parts.transformers_peer import padded
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.data.store.examples import Example
from glm_rlhf.engine.scoring.packed_batches import batches_of_records
from glm_rlhf.engine.training.loss import Learner, LossTerm
from glm_rlhf.engine.training.record_losses import RewardModelLoss
from glm_rlhf.engine.training.step import take_step
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

SHAPE = peer_model.SHAPE | {"num_hidden_layers": 2, "pad_token_id": 0}
HH_RLHF_LENGTHS = (
    *((16, 23, 11), (17, 14, 42), (17, 12, 68), (21, 54, 41), (40, 57, 26), (68, 31, 27)),
    *((95, 15, 17), (92, 40, 27), (127, 9, 25), (143, 16, 21), (148, 30, 36), (156, 27, 76)),
    *((128, 53, 169), (192, 48, 129), (255, 81, 103), (335, 47, 247)),
)
"""Tokens of prompt, chosen and rejected answer: the 16 quantiles, by total length, of the 2312 pairs of
hh-rlhf's harmless-base test set under ChatGLM3's tokenizer and chat form; see `length_quantiles`."""
BATCH = 8  # pairs per step
MICRO_BATCH_TOKENS = 16384
L2_COEF = 0.01
CLIP_GRAD = 1.0
FIRST_ID = 3  # no random token is padding or an end id
TARGET_RATIO = 1.5
# fp32 sums in another order: 1e-6; a sequence that sees another one gives 1e-2.
TOLERANCE = 1e-4
WARM_UP_RUNS = 1


class RandomPairs:
    """Pairs of random ids with given lengths, as the records of the command."""

    def __init__(self, lengths: Sequence[tuple[int, int, int]], *, seed: int = 7) -> None:
        """Draw the ids of prompts, chosen and rejected answers."""
        generator = torch.Generator().manual_seed(seed)
        self._examples = []
        for num_prompt, *answers in lengths:
            prompt = torch.randint(FIRST_ID, SHAPE["vocab_size"], (num_prompt,), generator=generator)
            tails = [torch.randint(FIRST_ID, SHAPE["vocab_size"], (n,), generator=generator) for n in answers]
            self._examples.append(
                tuple(Example(tokens_T=torch.cat((prompt, tail)), num_prompt=num_prompt) for tail in tails)
            )
        self.lengths = np.array([sum(len(e.tokens_T) for e in pair) for pair in self._examples])

    def __len__(self) -> int:
        return len(self._examples)

    def examples(self, number: int) -> tuple[Example, ...]:
        """Return the chosen and the rejected sequence of a pair."""
        return self._examples[number]

    def name(self, number: int) -> str:
        """Return what to call a pair."""
        return f"random pair {number}"


def length_quantiles(
    lengths: Sequence[tuple[int, int, int]], count: int = len(HH_RLHF_LENGTHS)
) -> list[tuple[int, int, int]]:
    """Return `count` of the pairs' lengths, evenly spaced when ordered by both sequences' tokens."""
    ordered = sorted(lengths, key=lambda three: (2 * three[0] + three[1] + three[2], three))
    return [ordered[int((index + 0.5) * len(ordered) / count)] for index in range(count)]


def measure_rows(threads: int, budget_s: float) -> list[Row]:
    """Return the row of this process with its thread count."""
    peer_model = random_glm(SHAPE, of="GlmForSequenceClassification", num_labels=1).train()
    pairs = RandomPairs(HH_RLHF_LENGTHS)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3)).tolist()
    steps = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    by_length = sorted(order, key=lambda number: int(pairs.lengths[number]))
    sorted_steps = [by_length[start : start + BATCH] for start in range(0, len(by_length), BATCH)]
    with tempfile.TemporaryDirectory() as folder, open_topology(Layout()) as topology:
        peer_model.save_pretrained(folder)
        chunks, _ = load_model(folder, topology, role="reward", dtype=torch.float32)
        state = TrainingState(chunks, AdamSettings(lr=0.0, clip_grad=CLIP_GRAD), topology=topology)
        problem = Problem(
            contenders=[
                Contender(name="ours, packed", run=_packed(state, pairs, steps, topology)),
                Contender(name="transformers, padded", run=_padded(peer_model, pairs, steps)),
                Contender(
                    name="transformers, padded, sorted",
                    run=_padded(peer_model, pairs, sorted_steps),
                    answer=lambda answer: (answer[0], None),  # its steps are others
                ),
            ],
            expected=lambda: _one_by_one(peer_model, pairs, steps),
            tolerance=TOLERANCE,
        )
        entries = measure(problem, device=torch.device("cpu"), budget_s=budget_s, warm_up_runs=WARM_UP_RUNS)
    row = Row(
        row=threads_text(threads),
        what=f"{len(steps)} training steps of {BATCH} pairs, lengths of hh-rlhf",
        shape=f"{pairs.lengths.sum()} tokens, longest {_longest(pairs)}, padding {_padding(pairs, steps)}, "
        f"sorted {_padding(pairs, sorted_steps)}",
        command=f"python -m benchmarks.training.reward_model --threads {threads} --budget-s {budget_s:g}",
        entries=entries,
        work=(float(pairs.lengths.sum()), "tokens"),
    )
    return [row]


def verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of the rows on the target, a sentence per thread count."""
    sentences = []
    for row in rows:
        engine, *others = row.entries
        if any(entry.timing is None for entry in row.entries):
            return f"Not shown: {'; '.join(entry.status for entry in row.entries if entry.status)}."
        ratios = [entry.timing.median_s / engine.timing.median_s for entry in others]
        judged = "met" if ratios[0] >= TARGET_RATIO else "missed"
        sentences.append(f"{row.row}: {ratios[0]:.2f} × ({judged}), {ratios[1]:.2f} × where it sorts.")
    return " ".join(sentences)


def _packed(
    state: TrainingState, pairs: RandomPairs, steps: Sequence[Sequence[int]], topology: Topology
) -> Callable[[], Answer]:
    loss = RewardModelLoss(l2_coef=L2_COEF)

    def run() -> Answer:
        results = []
        for numbers in steps:
            term = LossTerm(
                loss=loss,
                batches=batches_of_records(
                    pairs,
                    numbers,
                    max_tokens=MICRO_BATCH_TOKENS,
                    topology=topology,
                    streams=loss.streams,
                ),
                denominator=loss.denominator(numbers),
                name_items=str,
            )
            learner = Learner(role="reward", state=state, terms=(term,))
            results += take_step([learner], topology=topology).roles
        sums = [result.terms[0].by_name(loss) for result in results]
        losses = torch.tensor([own["loss"] for own in sums], dtype=torch.float32)
        return losses.sum(), torch.tensor([result.grad_norm for result in results])

    return run


def _padded(
    model: torch.nn.Module, pairs: RandomPairs, steps: Sequence[Sequence[int]]
) -> Callable[[], Answer]:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def run() -> Answer:
        losses, norms = [], []
        for numbers in steps:
            optimizer.zero_grad(set_to_none=True)
            sequences = [example.tokens_T for number in numbers for example in pairs.examples(number)]
            tokens_BT, mask_BT = padded(sequences)
            scores_B = model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, 0]
            loss = _loss(scores_B[0::2], scores_B[1::2], len(numbers))
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD))
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), torch.stack(norms)

    return run


def _one_by_one(model: torch.nn.Module, pairs: RandomPairs, steps: Sequence[Sequence[int]]) -> Answer:
    """Return the losses' sum and each step's gradient norm, every sequence run alone and unpadded."""
    total, norms = torch.zeros(()), []
    for numbers in steps:
        model.zero_grad(set_to_none=True)
        for number in numbers:
            scores = [model(e.tokens_T[None], use_cache=False).logits[:, 0] for e in pairs.examples(number)]
            loss = _loss(*scores, len(numbers))
            loss.backward()
            total += loss.detach()
        norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        )
    return total, torch.stack(norms)


def _loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, num_pairs: int) -> torch.Tensor:
    anchor = (chosen_B.square() + rejected_B.square()).sum()
    return (L2_COEF * anchor - logsigmoid(chosen_B - rejected_B).sum()) / num_pairs


def _longest(pairs: RandomPairs) -> int:
    return max(len(e.tokens_T) for number in range(len(pairs)) for e in pairs.examples(number))


def _padding(pairs: RandomPairs, steps: Sequence[Sequence[int]]) -> str:
    batches = [[len(e.tokens_T) for number in step for e in pairs.examples(number)] for step in steps]
    return f"{padding_share(batches):.0%}"


BENCHMARK = Benchmark(
    doc=__doc__,
    name="reward_training_cpu",
    title="Training a reward model on pairs as long as hh-rlhf's, CPU",
    options=thread_options(budget_s=10.0),
    measure=at_thread_counts(measure_rows),
    verdict=verdict,
    claim=lambda verdict: f"Target: at least {TARGET_RATIO} × transformers with padding. Measured: {verdict}",
    notes=(
        f"model: GLM of {shape_text(SHAPE)}; fp32; the same weights, pairs and thread count for all "
        "contenders",
        f"lengths: the {len(HH_RLHF_LENGTHS)} quantiles of hh-rlhf's 2312 harmless-base test pairs under "
        "ChatGLM3's tokenizer; ids are random",
        "a run: batches made of ids, clear gradients, forward, pairwise loss with the L2 term, backward, "
        "clipping at 1, AdamW at learning rate 0, which leaves the weights for the next run. tokens/s "
        "counts real tokens, not padding",
        "ours: what the command `reward` runs, `batches_of_records` and `take_step`",
        "transformers: GlmForSequenceClassification, its default attention (sdpa), both answers of all "
        "pairs of a step in one right-padded batch, torch's AdamW(fused=True). `sorted` has the batches "
        "made of neighbours in length, among these 16 pairs: over a whole file it would pad less",
        "checked before timing: the losses' sum, and each step's gradient norm, against each sequence "
        "run alone",
    ),
)

if __name__ == "__main__":
    BENCHMARK.run()
