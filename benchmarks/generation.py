"""Answers to a batch of prompts: our continuous batching against transformers' static, padded batches.

python -m benchmarks.generation
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.fresh_process import in_fresh_process
from benchmarks.harness import Contender, Problem, measure
from benchmarks.machine import description
from benchmarks.report import RESULTS, Report, Row, write
from glm_rlhf.engine.rollout.generation import BatchSettings, GenerationPhase
from glm_rlhf.engine.rollout.queue import GenerationRequest
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.layout import Layout
from glm_rlhf.parallel.load import load_model
from glm_rlhf.parallel.token_draw import SamplingSettings
from glm_rlhf.parallel.topology import Topology, topology

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "attention_bias": True,
    "pad_token_id": None,
    "eos_token_id": None,
}
MAX_BATCH, PAGE_SIZE = 32, 16
LONGEST_ANSWER = 192
TARGETS = {"equal": 1.5, "long tail": 3.0}
# fp32 sums in another order, over four layers: 1e-6; an answer that reads another one's keys gives 1e-1.
TOLERANCE = 1e-4
WARM_UP_RUNS = 1  # a run takes up to three seconds: caches are warm after one


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Prompts, and how long their answers are."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    lengths: tuple[int, ...]
    """Tokens wanted of each answer; where they differ an answer ends near there, at a stop id of its own."""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One prompt's answer."""

    place: int
    """The prompt's place in the mix."""
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    """Of each token under the model; None from a contender that does not say."""


def mixes() -> list[Mix]:
    """Return what is measured."""
    equal = _prompts([24] * 32)
    tail = [LONGEST_ANSWER if place % 8 == 3 else _geometric(place, 64, mean=16) for place in range(64)]
    return [
        Mix(name="equal, greedy", prompts=equal, lengths=(48,) * 32, temperature=0.0),
        Mix(name="equal, sampled", prompts=equal, lengths=(48,) * 32, temperature=1.0),
        Mix(
            name="long tail, sampled",
            prompts=_prompts([8 + place * 13 % 33 for place in range(64)]),
            lengths=tuple(tail),
            temperature=1.0,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where a contender was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, default 1 2")
    parser.add_argument(
        "--budget-s", type=float, default=10.0, help="seconds of timed runs a row, default 10"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "generation_cpu", help="report, without its suffix"
    )
    options = parser.parse_args(arguments)
    rows = []
    for threads in options.threads:
        environment = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        rows += in_fresh_process(measure_rows, threads, options.budget_s, environment=environment)
    write(report(rows), options.out)
    print(f"{options.out}.md: {verdict(rows)}")
    return 1 if any(entry.status for row in rows for entry in row.entries) else 0


def measure_rows(threads: int, budget_s: float) -> list[Row]:
    """Return one row a mix, in this process with its thread count."""
    from transformers import GlmConfig, GlmForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    theirs = GlmForCausalLM(GlmConfig(**SHAPE)).float().eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:  # wide enough that greedy answers do not repeat one token
            torch.nn.init.normal_(parameter, 0.0, 0.08)
    rows = []
    with tempfile.TemporaryDirectory() as folder, topology(Layout()) as place:
        theirs.save_pretrained(folder)
        chunks, _ = load_model(folder, place, dtype=torch.float32)
        for mix in mixes():
            requests = _requests(mix, chunks, place)
            answers = sorted(_ours(requests, mix, chunks, place)(), key=lambda answer: answer.place)
            lengths = [len(answer.tokens) for answer in answers]
            problem = Problem(
                contenders=[
                    Contender(name="ours, continuous", run=_ours(requests, mix, chunks, place)),
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
                    command=f"python -m benchmarks.generation --threads {threads} --budget-s {budget_s:g}",
                    entries=entries,
                    work=(float(sum(lengths)), "tokens"),
                )
            )
    return rows


def report(rows: Sequence[Row]) -> Report:
    """Return the report of all rows."""
    sizes = ", ".join(f"{name} {value}" for name, value in SHAPE.items() if value is not None)
    targets = ", ".join(f"{ratio} × ({name})" for name, ratio in TARGETS.items())
    return Report(
        title="Generation, CPU",
        claim=f"Target: at least {targets} transformers' `generate` with a static, padded batch. "
        f"Measured, by thread count: {verdict(rows)}",
        machine=description(torch.device("cpu")),
        rows=rows,
        notes=(
            f"model: GLM of {sizes}; random weights, fp32; the same weights, prompts and thread count for "
            "both",
            f"at most {MAX_BATCH} sequences at once. equal: 32 prompts of 24 tokens, 48 new tokens each",
            f"long tail: 64 prompts of 8 to 40 tokens; one answer in eight has {LONGEST_ANSWER} tokens, the "
            "others are geometric with mean 16. Ours does not know the lengths beforehand: each answer ends "
            "at a stop id of its own",
            f"transformers: GlmForCausalLM, its default attention (sdpa), batches of {MAX_BATCH} in the "
            "prompts' order, padded on the left, each run to its longest answer. tokens/s counts wanted "
            "tokens, not what is generated behind an answer's end",
            "a run includes what a phase makes and drops: the cache, the queue",
            "checked before timing: our tokens' logprobs against transformers' forward of the whole "
            "sequence, greedy tokens of both against its most likely tokens, every answer's length",
        ),
    )


def verdict(rows: Sequence[Row]) -> str:
    """Return what the rows say about the targets, in one sentence."""
    found: dict[str, list[str]] = {name: [] for name in TARGETS}
    is_met = True
    for row in rows:
        ours, theirs = row.entries
        if ours.timing is None or theirs.timing is None:
            return f"not shown: {ours.status or theirs.status} ({row.what})."
        ratio = theirs.timing.median_s / ours.timing.median_s
        name = next(name for name in TARGETS if row.what.startswith(name))
        found[name].append(f"{ratio:.2f}")
        is_met &= ratio >= TARGETS[name]
    ratios = "; ".join(f"{name} {', '.join(each)} ×" for name, each in found.items())
    return f"{ratios}: {'met' if is_met else 'MISSED'}."


def _prompts(lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        tuple(torch.randint(3, SHAPE["vocab_size"], (length,), generator=generator).tolist())
        for length in lengths
    )


def _geometric(place: int, count: int, *, mean: float) -> int:
    """Return a quantile of the geometric distribution, each place another: no draw can miss the tail."""
    quantile = (place * 29 % count + 0.5) / count
    return max(1, math.ceil(math.log1p(-quantile) / math.log1p(-1.0 / mean)))


def _requests(mix: Mix, chunks: Sequence[GLMModel], place: Topology) -> list[GenerationRequest]:
    """Return the requests of a mix; where lengths differ, each with the stop id that ends it there."""
    requests = [
        GenerationRequest(
            index=index, prompt=prompt, max_new_tokens=max(mix.lengths), stop_ids=frozenset(), seed=index
        )
        for index, prompt in enumerate(mix.prompts)
    ]
    if min(mix.lengths) == max(mix.lengths):
        return requests
    # A request's answer depends on nothing but itself: this run shows which tokens will come.
    whole = {answer.place: answer.tokens for answer in _ours(requests, mix, chunks, place)()}
    return [
        replace(request, stop_ids=frozenset({_stop_id(whole[request.index], length)}))
        if length < max(mix.lengths)
        else request
        for request, length in zip(requests, mix.lengths, strict=True)
    ]


def _stop_id(tokens: Sequence[int], length: int) -> int:
    """Return the id whose first place is the nearest to the wanted last one."""
    firsts = {token: tokens.index(token) for token in tokens}
    return min(firsts, key=lambda token: abs(firsts[token] + 1 - length))


def _ours(
    requests: Sequence[GenerationRequest], mix: Mix, chunks: Sequence[GLMModel], place: Topology
) -> Callable[[], list[Answered]]:
    batch = BatchSettings(max_batch=MAX_BATCH, max_step_tokens=1024, page_size=PAGE_SIZE)
    sampling = SamplingSettings(temperature=mix.temperature)
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)

    def run() -> list[Answered]:
        with GenerationPhase(chunks, topology=place, batch=batch, longest=longest) as phase:
            return [
                Answered(place=done.request, tokens=done.tokens, logprobs=done.plain_logprobs)
                for done in phase.run(requests, sampling)
            ]

    return run


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
