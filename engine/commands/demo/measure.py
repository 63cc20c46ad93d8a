"""What `demo` shows: how two policies answer held-out prompts, each figure with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from glm_rlhf.engine.commands import score
from glm_rlhf.engine.commands.demo.toy_task import TaskSet, ToyTask
from glm_rlhf.engine.commands.demo.training import ask, is_right, read_lines, write_lines
from glm_rlhf.engine.config.sections import (
    ForwardSection,
    ModelSection,
    RunSection,
    ScoreConfig,
    ScoredRecordsSection,
)
from glm_rlhf.engine.config.tools import DemoConfig
from glm_rlhf.engine.evaluation.confidence import ConfidenceInterval, mean_estimate, share_estimate

CLEAR_GAIN = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswers:
    """What one policy answers to the held-out prompts; a list of lines of `generate` for each."""

    greedy_sums: list[list[dict]]
    """The most likely answer to each sum."""
    sampled_sums: list[list[dict]]
    """Answers drawn at temperature 1."""
    greedy_canaries: list[list[dict]]
    """The most likely answer to each prompt of the task that is never rewarded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of both policies."""

    name: str
    """What is measured."""
    sft: ConfidenceInterval
    """Before PPO."""
    ppo: ConfidenceInterval
    """After PPO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All figures, over held-out prompts; an interval counts prompts, not samples."""

    greedy_accuracy: Comparison
    """Share of sums whose most likely answer is right."""
    sampled_accuracy: Comparison
    """Share of drawn answers to sums that are right."""
    canary_accuracy: Comparison
    """Share of right answers to the task that is never rewarded."""
    length: Comparison
    """Tokens of drawn answers to sums."""
    greedy_win_rate: ConfidenceInterval
    """How often PPO's most likely answer is right and SFT's wrong, ties as a half."""
    sampled_win_rate: ConfidenceInterval
    """The same of drawn answers."""
    kl: ConfidenceInterval
    """KL of PPO from SFT, in nats an answer: mean of log p_ppo − log p_sft of the answers PPO draws."""

    @property
    def is_clear_win(self) -> bool:
        """Whether both accuracies rose by 20 points or doubled, and no win rate may be chance."""
        return min(self.greedy_win_rate.low, self.sampled_win_rate.low) > 0.5 and all(
            pair.ppo.mean >= min(pair.sft.mean + CLEAR_GAIN, 2 * pair.sft.mean)
            for pair in (self.greedy_accuracy, self.sampled_accuracy)
        )


def answer_held_out(config: DemoConfig, tasks: TaskSet, policy: Path, *, name: str) -> HeldOutAnswers:
    """Return a policy's answers to the held-out prompts."""
    sums = tasks.held_out_sums
    greedy = ask(config, policy, sums + tasks.held_out_canaries, name=f"{name}_greedy", temperature=0.0)
    return HeldOutAnswers(
        greedy_sums=greedy[: len(sums)],
        sampled_sums=ask(config, policy, sums, name=f"{name}_sampled", temperature=1.0),
        greedy_canaries=greedy[len(sums) :],
    )


def compare(
    config: DemoConfig, tasks: TaskSet, sft_policy: Path, sft: HeldOutAnswers, ppo: HeldOutAnswers
) -> Results:
    """Return the figures of PPO's policy beside SFT's."""
    sums, canaries = tasks.held_out_sums, tasks.held_out_canaries

    def both(
        name: str, asked: Sequence[ToyTask], before: list[list[dict]], after: list[list[dict]]
    ) -> Comparison:
        return Comparison(
            name=name,
            sft=share_estimate(_shares_right(asked, before)),
            ppo=share_estimate(_shares_right(asked, after)),
        )

    return Results(
        greedy_accuracy=both("accuracy, greedy", sums, sft.greedy_sums, ppo.greedy_sums),
        sampled_accuracy=both("accuracy, sampled", sums, sft.sampled_sums, ppo.sampled_sums),
        canary_accuracy=both("canary accuracy", canaries, sft.greedy_canaries, ppo.greedy_canaries),
        length=Comparison(
            name="answer length, tokens",
            sft=mean_estimate(_lengths(sft.sampled_sums)),
            ppo=mean_estimate(_lengths(ppo.sampled_sums)),
        ),
        greedy_win_rate=share_estimate(_wins(sums, ppo.greedy_sums, sft.greedy_sums)),
        sampled_win_rate=share_estimate(_wins(sums, ppo.sampled_sums, sft.sampled_sums)),
        kl=_kl(config, sft_policy, ppo.sampled_sums),
    )


def _shares_right(tasks: Sequence[ToyTask], answers: list[list[dict]]) -> list[float]:
    return [fmean(is_right(task, line) for line in of) for task, of in zip(tasks, answers, strict=True)]


def _lengths(answers: list[list[dict]]) -> list[float]:
    return [fmean(len(line["tokens"]) for line in of_prompt) for of_prompt in answers]


def _wins(tasks: Sequence[ToyTask], mine: list[list[dict]], others: list[list[dict]]) -> list[float]:
    """Return each prompt's wins of the i-th answer over the other's i-th, a tie as a half."""
    return [
        fmean(
            0.5 + 0.5 * (is_right(task, answer) - is_right(task, other))
            for answer, other in zip(*of, strict=True)
        )
        for task, *of in zip(tasks, mine, others, strict=True)
    ]


def _kl(config: DemoConfig, sft_policy: Path, answers: list[list[dict]]) -> ConfidenceInterval:
    """Return the mean over prompts of what the answers' own policy gives them beyond SFT's, in nats."""
    folder = Path(config.run.output)
    asked, out = folder / "data" / "ppo_answers.jsonl", folder / "answers" / "ppo_by_sft.jsonl"
    flat = [line for of_prompt in answers for line in of_prompt]
    write_lines(asked, ({"prompt_tokens": a["prompt_tokens"], "response_tokens": a["tokens"]} for a in flat))
    score.run(
        ScoreConfig(
            run=RunSection(name="score", output=str(out.parent), seed=config.run.seed),
            model=ModelSection(path=str(sft_policy)),
            data=ScoredRecordsSection(path=str(asked), out=str(out)),
            train=ForwardSection(dtype="fp32", micro_batch_tokens=4096),
        )
    )
    lines = read_lines(out)
    gaps = iter(sum(a["logprobs"]) - sum(b["logprobs"]) for a, b in zip(flat, lines, strict=True))
    return mean_estimate([fmean(next(gaps) for _ in of_prompt) for of_prompt in answers])
