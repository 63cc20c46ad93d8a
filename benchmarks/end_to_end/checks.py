"""Claims that a PPO run on real input must satisfy, each with its figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Metrics = Mapping[str, float | None]

MAX_FIRST_KL = 1e-4
"""Nats per answer before the first update: the policy is the reference, sums run in another order (fp32)."""
MAX_PPO_KL = 1e-8
"""Of each iteration's first step, nats per token."""
MAX_LOGPROB_GAP = 1e-5
"""Between the sampler and a training forward, nats per token, fp32."""
MAX_CLIP_FRACTION = 0.3
MAX_KL_PER_TOKEN = 0.5
"""Nats, after ten iterations: above it the policy is too far from its reference."""
MAX_TRANSFORMERS_GAP = 1e-4
"""Between our logprobs and those of transformers, nats, fp32: the project's own bound for logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim."""

    claim: str
    """What must hold."""
    figure: str
    """The measured value."""
    holds: bool
    """Whether it holds."""


def check_metrics(metrics: Sequence[Metrics], *, iterations: int, num_ids: int) -> list[Check]:
    """Return the checks of the lines of `metrics.jsonl`.

    Args:
        metrics: one per line, null where a number was not finite.
        iterations: of the run.
        num_ids: ids that can be sampled, whose logarithm bounds the entropy.
    """
    steps = [line["step"] for line in metrics]
    missing = sorted({name for line in metrics for name, value in line.items() if value is None})
    is_whole = steps == list(range(1, iterations + 1))
    checks = [
        Check(claim=f"{iterations} iterations", figure=f"{len(steps)}", holds=is_whole),
        Check(
            claim="every metric of every iteration is finite",
            figure=", ".join(missing) or f"{sum(map(len, metrics))} numbers",
            holds=bool(metrics) and not missing,
        ),
    ]
    if not all(check.holds for check in checks):
        return checks
    kl = [line["objective/kl"] for line in metrics]
    top = math.log(num_ids)
    checks += [
        Check(
            claim=f"objective/kl begins at 0 (below {MAX_FIRST_KL:g} nats an answer)",
            figure=f"{kl[0]:.2g}",
            holds=abs(kl[0]) < MAX_FIRST_KL,
        ),
        Check(
            claim="and leaves it once the policy learns",
            figure=f"{kl[-1]:.3g} in the last iteration",
            holds=abs(kl[-1]) > 10 * MAX_FIRST_KL,
        ),
    ]
    ranges: list[tuple[str, str, Callable[[float], bool]]] = [
        (
            "objective/kl_per_token",
            f" stays below {MAX_KL_PER_TOKEN:g} nats",
            lambda value: abs(value) < MAX_KL_PER_TOKEN,
        ),
        (
            "actor/first_ppo_kl",
            f": actor/ppo_kl of every iteration's first step is below {MAX_PPO_KL:g}",
            lambda value: abs(value) < MAX_PPO_KL,
        ),
        (
            "rollout/logprob_gap",
            f" stays below {MAX_LOGPROB_GAP:g}",
            lambda value: 0 <= value < MAX_LOGPROB_GAP,
        ),
        (
            "actor/entropy",
            f" stays between 1 and ln {num_ids} = {top:.2f} nats",
            lambda value: 1 < value <= top,
        ),
        (
            "actor/pg_clipfrac",
            f" stays below {MAX_CLIP_FRACTION:g}",
            lambda value: 0 <= value < MAX_CLIP_FRACTION,
        ),
        ("actor/grad_norm", " is above 0", lambda value: value > 0),
        ("reward/minus_baseline/std", ": rewards differ between answers", lambda value: value > 0),
    ]
    for name, claim, is_sane in ranges:
        values = [line[name] for line in metrics]
        figure = f"{min(values):.3g} to {max(values):.3g}"
        checks.append(Check(claim=f"{name}{claim}", figure=figure, holds=all(map(is_sane, values))))
    return checks


def check_samples(samples: Sequence[Mapping], *, never: Sequence[bool], max_new_tokens: int) -> list[Check]:
    """Return the checks of the sample answers.

    Args:
        samples: lines of the files in `samples/`.
        never: for each row of the embedding, whether no sampler may choose it.
        max_new_tokens: longest answer.
    """
    prompts = {tuple(one["prompt_tokens"]) for one in samples}
    prompt_lengths = {len(prompt) for prompt in prompts}
    lengths = [len(one["tokens"]) for one in samples]
    tokens = [token for one in samples for token in one["tokens"]]
    num_never = sum(never[token] for token in tokens)
    return [
        Check(
            claim=f"none of the {sum(never)} rows that may not be sampled was: no row without a token, no "
            "marker of the chat form",
            figure=f"{num_never} of {len(tokens)} tokens",
            holds=num_never == 0 and len(tokens) > 0,
        ),
        Check(
            claim=f"answers have 1 to {max_new_tokens} tokens",
            figure=f"{min(lengths)} to {max(lengths)}",
            holds=all(1 <= length <= max_new_tokens for length in lengths),
        ),
        Check(
            claim="prompts have uneven lengths",
            figure=f"{min(prompt_lengths)} to {max(prompt_lengths)} tokens in {len(prompts)} prompts",
            holds=len(prompt_lengths) > len(prompts) / 4,
        ),
        Check(
            claim="every sample has texts and a reward",
            figure=f"{len(samples)} samples",
            holds=all(one["prompt"] and one["text"] is not None for one in samples)
            and all(isinstance(one["reward"], float) for one in samples),
        ),
    ]
