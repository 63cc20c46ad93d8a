"""What `demo` writes down: a page with figures, curves and answers, and the figures as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from glm_rlhf.engine.commands.demo.checks import DemoCheck
from glm_rlhf.engine.commands.demo.measure import HeldOutAnswers, Results
from glm_rlhf.engine.commands.demo.toy_task import TaskSet
from glm_rlhf.engine.evaluation.confidence import ConfidenceInterval
from glm_rlhf.engine.observe.report import ReportTable, write_report
from glm_rlhf.parallel.storage.durable_io import replace_text

RESULTS_NAME = "demo.json"
"""Of the file in the run folder that holds every figure."""
_NUM_ANSWERS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardFacts:
    """What the reward model is made of, and how good it is."""

    num_pairs: int
    """Pairs that it learned from, the policy's own answers."""
    num_held_out_pairs: int
    """Pairs of answers to held-out prompts."""
    pair_accuracy: float
    """Share of those that it orders rightly."""


def write_results(
    folder: Path,
    *,
    seed: int,
    reward: RewardFacts,
    results: Results,
    checks: Sequence[DemoCheck],
    timing_s: dict[str, float],
) -> Path:
    """Return the path of `demo.json` after writing every figure there."""
    facts = {
        "seed": seed,
        "is_clear_win": results.is_clear_win,
        "reward": dataclasses.asdict(reward),
        "results": dataclasses.asdict(results),
        "checks": [dataclasses.asdict(check) | {"is_alike": check.is_alike} for check in checks],
        "timing_s": timing_s,
    }
    path = folder / RESULTS_NAME
    replace_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return path


def write_page(
    folder: Path,
    *,
    tasks: TaskSet,
    before: HeldOutAnswers,
    after: HeldOutAnswers,
    reward: RewardFacts,
    results: Results,
    checks: Sequence[DemoCheck],
) -> Path:
    """Return the path of the report of the PPO run, the demo's figures on top."""
    answers = [
        (task.prompt, old["text"].strip(), new["text"].strip(), task.answer)
        for task, (old,), (new,) in zip(
            tasks.held_out_sums, before.greedy_sums, after.greedy_sums, strict=True
        )
    ]
    tables = (
        ReportTable(
            title="PPO against SFT on held-out prompts",
            columns=("figure", "SFT", "PPO"),
            rows=tuple(figure_rows(results)),
            note=f"95 % intervals over {results.kl.num_units} prompts. PPO's reward was the reward model "
            f"alone, which orders {reward.pair_accuracy:.1%} of {reward.num_held_out_pairs} held-out pairs "
            "rightly.",
        ),
        ReportTable(
            title="Held-out sums, greedy",
            columns=("prompt", "SFT", "PPO", "right"),
            rows=tuple(answers[:_NUM_ANSWERS]),
        ),
        ReportTable(
            title="The policy after PPO elsewhere",
            columns=("where", "asked", "same tokens", "largest logprob gap"),
            rows=tuple(
                (c.name, c.num_asked, c.num_same, "–" if c.logprob_gap is None else c.logprob_gap)
                for c in checks
            ),
        ),
    )
    return write_report(folder / "ppo", title="glm-rlhf demo: PPO", tables=tables)


def figure_rows(results: Results) -> list[tuple[str, str, str]]:
    """Return name, SFT's and PPO's side of every figure, in words."""
    pairs = (results.greedy_accuracy, results.sampled_accuracy, results.canary_accuracy, results.length)
    return [
        *((pair.name, describe(pair.sft), describe(pair.ppo)) for pair in pairs),
        ("win rate against SFT, greedy", "", describe(results.greedy_win_rate)),
        ("win rate against SFT, sampled", "", describe(results.sampled_win_rate)),
        ("KL from SFT, nats an answer", "", describe(results.kl)),
    ]


def describe(estimate: ConfidenceInterval) -> str:
    """Return a mean with its interval."""
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
