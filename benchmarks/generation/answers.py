"""Answers to a batch of prompts: our continuous batching against transformers' static, padded batches.

python -m benchmarks.generation.answers
"""

import math
import tempfile
from collections.abc import Callable, Sequence

import torch

from benchmarks.generation.mixes import (
    LONGEST_ANSWER,
    MAX_BATCH,
    SHAPE,
    Answered,
    Mix,
    mixes,
    random_model,
    requests_of,
    run_of,
)
from benchmarks.generation.ticks import is_tick_row, tick_rows, tick_verdict
from benchmarks.harness.command import Benchmark
from benchmarks.harness.peer_model import shape_text
from benchmarks.harness.thread_counts import at_thread_counts, thread_options, threads_text
from glm_rlhf.engine.bench.harness import Contender, Problem, measure
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

TARGETS = {"uniform": 1.5, "long tail": 3.0}
# fp32 sums in another order, over four layers: 1e-6; an answer that reads another one's keys gives 1e-1.
TOLERANCE = 1e-4
WARM_UP_RUNS = 1  # a run takes up to three seconds: caches are warm after one


def measure_rows(threads: int, budget_s: float) -> list[Row]:
    """Return one row per mix, in this process with its thread count."""
    peer_model = random_model()
    rows = []
    with tempfile.TemporaryDirectory() as folder, open_topology(Layout()) as topology:
        peer_model.save_pretrained(folder)
        chunks, _ = load_model(folder, topology, dtype=torch.float32)
        for mix in mixes():
            requests = requests_of(mix, chunks, topology)
            answers = sorted(run_of(requests, mix, chunks, topology)(), key=lambda answer: answer.prompt)
            lengths = [len(answer.tokens) for answer in answers]
            problem = Problem(
                contenders=[
                    Contender(name="ours, continuous", run=run_of(requests, mix, chunks, topology)),
                    Contender(name="transformers, static", run=_static_batches(peer_model, mix, lengths)),
                ],
                expected=None,
                tolerance=TOLERANCE,
                error=lambda answers, _, mix=mix, lengths=lengths: _error(answers, mix, lengths, peer_model),
            )
            entries = measure(
                problem, device=torch.device("cpu"), budget_s=budget_s, warm_up_runs=WARM_UP_RUNS
            )
            rows.append(
                Row(
                    row=threads_text(threads),
                    what=mix.name,
                    shape=_shape_text(mix, lengths),
                    command=f"python -m benchmarks.generation.answers --threads {threads}"
                    f" --budget-s {budget_s:g}",
                    entries=entries,
                    work=(float(sum(lengths)), "tokens"),
                )
            )
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of the rows on the targets, in one sentence."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        engine, peer = row.entries
        if engine.timing is None or peer.timing is None:
            return f"not shown: {engine.status or peer.status} ({row.what})."
        by_task.setdefault(row.what, []).append(peer.timing.median_s / engine.timing.median_s)
    sentences = []
    for what, ratios in by_task.items():
        target = next((TARGETS[name] for name in TARGETS if what.startswith(name)), None)
        judged = "" if target is None else " (met)" if min(ratios) >= target else " (missed)"
        sentences.append(f"{what}: {' and '.join(f'{ratio:.2f}' for ratio in ratios)} ×{judged}")
    return "; ".join(sentences) + "."


def _verdicts(rows: Sequence[Row]) -> str:
    ticks = [row for row in rows if is_tick_row(row)]
    return f"{verdict([row for row in rows if row not in ticks])} {tick_verdict(ticks)}"


def _static_batches(model: torch.nn.Module, mix: Mix, lengths: Sequence[int]) -> Callable[[], list[Answered]]:
    batches = []
    for first in range(0, len(mix.prompts), MAX_BATCH):
        prompts = mix.prompts[first : first + MAX_BATCH]
        width = max(len(prompt) for prompt in prompts)
        tokens, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64).unbind(0)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        batches.append((first, tokens, mask, max(lengths[first : first + MAX_BATCH])))
    options = {"do_sample": mix.temperature > 0, "pad_token_id": 0}
    if mix.temperature > 0:
        options |= {"temperature": mix.temperature, "top_k": 0}

    @torch.no_grad()
    def run() -> list[Answered]:
        answers = []
        for first, tokens, mask, longest in batches:
            whole = model.generate(tokens, attention_mask=mask, max_new_tokens=longest, **options)
            for row, new in enumerate(whole[:, tokens.shape[1] :].tolist(), first):
                answers.append(Answered(prompt=row, tokens=tuple(new[: lengths[row]]), logprobs=None))
        return answers

    return run


@torch.no_grad()
def _error(answers: Sequence[Answered], mix: Mix, lengths: Sequence[int], model: torch.nn.Module) -> float:
    """Return the largest distance of a logprob, or of a greedy token's from the best one; infinite if some
    answer is missing or of another length."""
    answers = sorted(answers, key=lambda answer: answer.prompt)
    if [len(answer.tokens) for answer in answers] != list(lengths):
        return math.inf
    worst = 0.0
    for prompt, answer in zip(mix.prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        if answer.logprobs is not None:
            worst = max(worst, float((chosen - torch.tensor(answer.logprobs)).abs().max()))
        if mix.temperature == 0:
            worst = max(worst, float((logprobs.amax(1) - chosen).max()))
    return worst


def _shape_text(mix: Mix, lengths: Sequence[int]) -> str:
    total = sum(
        max(lengths[first : first + MAX_BATCH]) * len(lengths[first : first + MAX_BATCH])
        for first in range(0, len(lengths), MAX_BATCH)
    )
    return (
        f"{len(lengths)} prompts, {sum(lengths)} new tokens, longest {max(lengths)}, "
        f"{1 - sum(lengths) / total:.0%} of a static batch's behind an end"
    )


_TARGETS_TEXT = ", ".join(f"{ratio} × ({name})" for name, ratio in TARGETS.items())
BENCHMARK = Benchmark(
    doc=__doc__,
    name="generation_cpu",
    title="Generation, CPU",
    options=thread_options(budget_s=10.0),
    measure=lambda options: [*at_thread_counts(measure_rows)(options), *tick_rows()],
    verdict=_verdicts,
    claim=lambda verdict: (
        f"Target: at least {_TARGETS_TEXT} transformers' `generate` with a static, padded batch. "
        f"Measured, by thread count: {verdict}"
    ),
    notes=(
        f"model: GLM of {shape_text(SHAPE)}; random weights, fp32; the same weights, prompts and thread "
        "count for both",
        f"at most {MAX_BATCH} sequences at once. equal: 32 prompts of 24 tokens, 48 new tokens each",
        "uniform: 64 prompts of 8 to 40 tokens, answers of 8 to 71 tokens. long tail: the same prompts; "
        f"one answer in eight has {LONGEST_ANSWER} tokens, the others are geometric with mean 16. Ours "
        "does not know the lengths beforehand: each answer ends at a stop id of its own",
        f"transformers: GlmForCausalLM, its default attention (sdpa), batches of {MAX_BATCH} in the "
        "prompts' order, padded on the left, each run to its longest answer. tokens/s counts wanted "
        "tokens, not what is generated behind an answer's end",
        "a run includes what a phase makes and drops: the cache, the queue",
        "checked before timing: our tokens' logprobs against transformers' forward of the whole "
        "sequence, greedy tokens of both against its most likely tokens, every answer's length",
        "pipeline: turns of a stage without a group to compute, counted in the schedule as it ran; "
        "steady: while prompts still wait; whole run: the end too, when groups run empty",
    ),
)

if __name__ == "__main__":
    BENCHMARK.run()
