"""Trials of an experiment compared seed by seed, as one Markdown and one JSON file."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from tqdm import tqdm

from benchmarks import RESULTS
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import facts, number, table, write_files

# Student's t at 97.5 %, by degrees of freedom: two-sided 95 % intervals of a mean.
_T_95 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201}
SEEDS = tuple(range(1, 7))
"""Default of every experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of one arm."""

    arm: str
    """What is varied, in words."""
    seed: int
    """Of data, weights and order; the arms of a seed share them."""
    figures: dict[str, float]
    """Results, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim about the difference of two arms, seed by seed."""

    text: str
    """The claim, in words."""
    figure: str
    """Which figure is compared."""
    arm: str
    """The arm that the claim is about."""
    against: str
    """The arm that it is compared with."""
    expects: Literal["lower", "higher", "within"]
    """Sign of arm − against; or that it stays within ± `margin`."""
    margin: float = 0.0
    """Of `within`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict of the trials on a claim."""

    claim: Claim
    """The claim."""
    mean_difference: float
    """Mean over seeds of arm − against."""
    interval: float
    """Half the width of the mean's 95 % interval (Student's t over seeds)."""
    num_in_direction: int
    """Seeds whose own difference is as expected."""
    num_seeds: int
    """Seeds compared."""
    is_shown: bool
    """Whether the whole interval is on the expected side of 0, or within the margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An experiment with its results."""

    title: str
    """Heading of the report."""
    command: str
    """Runs it again."""
    notes: Sequence[str]
    """How the data were made and what was held equal."""
    claims: Sequence[Claim]
    """What it is to show."""
    trials: Sequence[Trial]
    """All runs, none excluded."""
    elapsed_s: float
    """Of the whole experiment, on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Arms compared over seeds, and the claims about them."""

    name: str
    """The module's, in `benchmarks.learning`."""
    title: str
    """Heading of the report."""
    claims: Sequence[Claim]
    """What it is to show."""
    notes: Sequence[str]
    """How the data were made and what was held equal."""
    seeds: Sequence[int] = SEEDS
    """5 to 12 of them."""

    def run(self, trials_of: Callable[[int], list[Trial]]) -> int:
        """Run every seed, write the report and return the exit status: 1 where a claim is not shown.

        Args:
            trials_of: runs all arms of a seed.
        """
        start = time.monotonic()
        outcome = Outcome(
            title=self.title,
            command=f"python -m benchmarks.learning.{self.name}",
            notes=self.notes,
            claims=self.claims,
            trials=[trial for seed in tqdm(self.seeds, unit=" seeds") for trial in trials_of(seed)],
            elapsed_s=time.monotonic() - start,
        )
        verdicts = write_outcome(outcome, self.name)
        for verdict in verdicts:
            print(f"{_shown(verdict)}: {verdict.claim.text}")
        return 0 if all(verdict.is_shown for verdict in verdicts) else 1


def compare(arm: str, against: str, *claims: tuple[str, str, str]) -> tuple[Claim, ...]:
    """Return claims (text, figure, expected difference) about two arms; `within 0.01` gives the margin."""
    return tuple(
        Claim(
            text=text,
            figure=figure,
            arm=arm,
            against=against,
            expects=expects.partition(" ")[0],
            margin=float(expects.partition(" ")[2] or 0),
        )
        for text, figure, expects in claims
    )


def judge(claim: Claim, trials: Sequence[Trial]) -> Verdict:
    """Return the verdict of the trials on a claim.

    Raises:
        ValueError: arms with other seeds than each other's, or too few or too many seeds for the table of t.
    """
    arms = [
        {trial.seed: trial.figures[claim.figure] for trial in trials if trial.arm == arm}
        for arm in (claim.arm, claim.against)
    ]
    if arms[0].keys() != arms[1].keys() or len(arms[0]) - 1 not in _T_95:
        raise ValueError(
            f"{claim.arm} has the seeds {sorted(arms[0])}, {claim.against} {sorted(arms[1])}; they must be "
            "the same, from 5 to 12 of them"
        )
    differences = [arms[0][seed] - arms[1][seed] for seed in arms[0]]
    mean = fmean(differences)
    interval = _T_95[len(differences) - 1] * stdev(differences) / math.sqrt(len(differences))
    return Verdict(
        claim=claim,
        mean_difference=mean,
        interval=interval,
        num_in_direction=sum(_is_as_expected(claim, difference) for difference in differences),
        num_seeds=len(differences),
        is_shown=_is_as_expected(claim, mean - interval) and _is_as_expected(claim, mean + interval),
    )


def _is_as_expected(claim: Claim, difference: float) -> bool:
    if claim.expects == "within":
        return abs(difference) <= claim.margin
    return difference < 0 if claim.expects == "lower" else difference > 0


def write_outcome(outcome: Outcome, name: str, folder: Path = RESULTS) -> list[Verdict]:
    """Return the verdicts, and write `<folder>/learning_<name>.md` and `.json`."""
    verdicts = [judge(claim, outcome.trials) for claim in outcome.claims]
    machine = description(torch.device("cpu"), has_cuda_columns=False)
    content = asdict(outcome) | {"machine": machine, "verdicts": [asdict(v) for v in verdicts]}
    write_files(folder / f"learning_{name}", as_markdown(outcome, verdicts, machine), content)
    return verdicts


def as_markdown(outcome: Outcome, verdicts: Sequence[Verdict], machine: dict[str, str]) -> str:
    """Return the claims with their verdicts, then each arm's figures as mean ± standard deviation."""
    claims = [
        (
            verdict.claim.text,
            f"{_cell(verdict.claim.figure)}: {verdict.claim.arm} − {verdict.claim.against}",
            f"{verdict.mean_difference:+.3g} ± {verdict.interval:.2g}",
            f"{verdict.num_in_direction} of {verdict.num_seeds}",
            _shown(verdict),
        )
        for verdict in verdicts
    ]
    arms = list(dict.fromkeys(trial.arm for trial in outcome.trials))
    figures = dict.fromkeys(name for trial in outcome.trials for name in trial.figures)
    lines = [
        f"# {outcome.title}",
        "",
        *(f"- {note}" for note in outcome.notes),
        f"- command: `{outcome.command}`, {outcome.elapsed_s:.0f} s on the machine below",
        *facts(machine),
        "",
        *table(("claim", "figure", "difference, 95 % interval", "seeds in direction", "verdict"), claims),
        "",
        *table(("figure", *arms), [(_cell(name), *_means(outcome.trials, name, arms)) for name in figures]),
        "",
        "Differences are taken seed by seed; a claim is shown when the 95 % interval of their mean, by "
        "Student's t, lies wholly on the claimed side of 0, or wholly within the margin. Figures of arms are "
        "means over seeds ± standard deviation. Every trial is in the JSON file.",
    ]
    return "\n".join(lines) + "\n"


def _means(trials: Sequence[Trial], name: str, arms: Sequence[str]) -> Iterator[str]:
    for arm in arms:
        values = [t.figures[name] for t in trials if t.arm == arm and name in t.figures]
        yield f"{number(fmean(values))} ± {stdev(values):.2g}" if len(values) > 1 else ""


def _shown(verdict: Verdict) -> str:
    return "shown" if verdict.is_shown else "NOT shown"


def _cell(name: str) -> str:
    """Return a figure's name as a table takes it: |x| holds what would end the cell."""
    return name.replace("|", "\\|")
