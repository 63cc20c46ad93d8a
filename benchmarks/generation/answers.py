"""Answers to a batch of prompts: our continuous batching against transformers' static, padded batches.

python -m benchmarks.generation.answers
"""

import math
import os
import sys
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
from benchmarks.generation.ticks import tick_rows, tick_verdict
from benchmarks.harness.thread_counts import parse_options, rows_of
from glm_rlhf.engine.bench.harness import Contender, Problem, measure
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import Report, Row, write
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

TARGETS = {"uniform": 1.5, "long tail": 3.0}
# fp32 sums in another order, over four layers: 1e-6; an answer that reads another one's keys gives 1e-1.
TOLERANCE = 1e-4
WARM_UP_RUNS = 1  # a run takes up to three seconds: caches are warm after one


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where a contender was wrong."""
    options = parse_options(arguments, doc=__doc__, name="generation_cpu", budget_s=10.0)
    rows = rows_of(options, measure_rows)
    ticks = tick_rows()
    write(report(rows, ticks), options.out)
    print(f"{options.out}.md: {verdict(rows)}")
    return 1 if any(entry.status for row in rows for entry in row.entries) else 0


def measure_rows(threads: int, budget_s: float) -> list[Row]:
    """Return one row a mix, in this process with its thread count."""
    theirs = random_model()
    rows = []
    with tempfile.TemporaryDirectory() as folder, open_topology(Layout()) as topology:
        theirs.save_pretrained(folder)
        chunks, _ = load_model(folder, topology, dtype=torch.float32)
        for mix in mixes():
            requests = requests_of(mix, chunks, topology)
            answers = sorted(run_of(requests, mix, chunks, topology)(), key=lambda answer: answer.place)
            lengths = [len(answer.tokens) for answer in answers]
            problem = Problem(
                contenders=[
                    Contender(name="ours, continuous", run=run_of(requests, mix, chunks, topology)),
                    Contender(name="transformers, static", run=_theirs(theirs, mix, lengths)),
                ],
                expected=None,
                tolerance=TOLERANCE,
                error=lambda found, _, mix=mix, lengths=lengths: _error(found, mix, lengths, theirs),
            )
            entries = measure(
                problem, device=torch.device("cpu"), budget_s=budget_s, warm_up_runs=WARM_UP_RUNS
            )
            rows.append(
                Row(
                    row=f"{threads} thread{'s' * (threads > 1)}",
                    what=mix.name,
                    shape=_shape_text(mix, lengths),
                    command=f"python -m benchmarks.generation.answers --threads {threads}"
                    f" --budget-s {budget_s:g}",
                    entries=entries,
                    work=(float(sum(lengths)), "tokens"),
                )
            )
    return rows


def report(rows: Sequence[Row], ticks: Sequence[Row]) -> Report:
    """Return the report of all rows."""
    sizes = ", ".join(f"{name} {value}" for name, value in SHAPE.items() if value is not None)
    targets = ", ".join(f"{ratio} × ({name})" for name, ratio in TARGETS.items())
    return Report(
        title="Generation, CPU",
        claim=f"Target: at least {targets} transformers' `generate` with a static, padded batch. "
        f"Measured, by thread count: {verdict(rows)} {tick_verdict(ticks)}",
        machine=description(torch.device("cpu")),
        rows=[*rows, *ticks],
        notes=(
            f"model: GLM of {sizes}; random weights, fp32; the same weights, prompts and thread count for "
            "both",
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


def verdict(rows: Sequence[Row]) -> str:
    """Return what the rows say about the targets, in one sentence."""
    found: dict[str, list[float]] = {}
    for row in rows:
        ours, theirs = row.entries
        if ours.timing is None or theirs.timing is None:
            return f"not shown: {ours.status or theirs.status} ({row.what})."
        found.setdefault(row.what, []).append(theirs.timing.median_s / ours.timing.median_s)
    sentences = []
    for what, ratios in found.items():
        target = next((TARGETS[name] for name in TARGETS if what.startswith(name)), None)
        judged = "" if target is None else " (met)" if min(ratios) >= target else " (missed)"
        sentences.append(f"{what}: {' and '.join(f'{ratio:.2f}' for ratio in ratios)} ×{judged}")
    return "; ".join(sentences) + "."


def _theirs(model: torch.nn.Module, mix: Mix, lengths: Sequence[int]) -> Callable[[], list[Answered]]:
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
                answers.append(Answered(place=row, tokens=tuple(new[: lengths[row]]), logprobs=None))
        return answers

    return run


@torch.no_grad()
def _error(found: Sequence[Answered], mix: Mix, lengths: Sequence[int], model: torch.nn.Module) -> float:
    """Return the largest distance of a logprob, or of a greedy token's from the best one; infinite if some
    answer is missing or of another length."""
    by_place = {answer.place: answer for answer in found}
    if [len(by_place[place].tokens) for place in sorted(by_place)] != list(lengths):
        return math.inf
    worst = 0.0
    for place, prompt in enumerate(mix.prompts):
        answer = by_place[place]
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        if answer.logprobs is not None:
            worst = max(worst, float((own - torch.tensor(answer.logprobs)).abs().max()))
        if mix.temperature == 0:
            worst = max(worst, float((logprobs.amax(1) - own).max()))
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


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
