"""Trials of an experiment compared seed by seed, as one Markdown and one JSON file."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from tqdm import tqdm

from benchmarks import RESULTS
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import number

# Student's t at 97.5 %, by degrees of freedom: two-sided 95 % intervals of a mean.
_T_95 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201}
SEEDS = tuple(range(1, 7))
"""Of every experiment that names no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of one arm."""

    arm: str
    """What is varied, in words."""
    seed: int
    """Of data, weights and order; the arms of a seed share them."""
    figures: dict[str, float]
    """What came out, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the difference of two arms, seed by seed, is to show."""

    text: str
    """The claim, in words."""
    figure: str
    """Which figure is compared."""
    arm: str
    """The arm that is claimed to do something."""
    against: str
    """The arm that it is compared with."""
    expects: Literal["lower", "higher", "within"]
    """Sign of arm − against; or that it stays within ± `margin`."""
    margin: float = 0.0
    """Of `within`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the trials say about a claim."""

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
    """What runs it again."""
    notes: Sequence[str]
    """How the data were made and what was held equal."""
    claims: Sequence[Claim]
    """What it is to show."""
    trials: Sequence[Trial]
    """All runs, none left out."""
    elapsed_s: float
    """Of the whole experiment, on this machine."""


def run_experiment(
    name: str,
    trials_of: Callable[[int], list[Trial]],
    seeds: Sequence[int],
    *,
    title: str,
    claims: Sequence[Claim],
    notes: Sequence[str],
) -> int:
    """Run every seed, write `learning_<name>` and return the exit status: 1 where a claim is not shown.

    Args:
        name: the module's, in `benchmarks.learning`.
        trials_of: runs all arms of a seed.
        seeds: 5 to 12 of them.
        title, claims, notes: as in `Outcome`.
    """
    start = time.monotonic()
    trials = [trial for seed in tqdm(seeds, unit=" seeds") for trial in trials_of(seed)]
    outcome = Outcome(
        title=title,
        command=f"python -m benchmarks.learning.{name}",
        notes=notes,
        claims=claims,
        trials=trials,
        elapsed_s=time.monotonic() - start,
    )
    verdicts = write_outcome(outcome, name)
    for verdict in verdicts:
        print(f"{'shown' if verdict.is_shown else 'NOT shown'}: {verdict.claim.text}")
    return 0 if all(verdict.is_shown for verdict in verdicts) else 1


def judge(claim: Claim, trials: Sequence[Trial]) -> Verdict:
    """Return what the trials say about a claim.

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
    machine = description(torch.device("cpu"))
    machine.pop("CUDA", None)  # nothing here is a matter of speed
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"learning_{name}"
    stem.with_suffix(".md").write_text(as_markdown(outcome, verdicts, machine), encoding="utf-8")
    content = asdict(outcome) | {"machine": machine, "verdicts": [asdict(v) for v in verdicts]}
    stem.with_suffix(".json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return verdicts


def as_markdown(outcome: Outcome, verdicts: Sequence[Verdict], machine: dict[str, str]) -> str:
    """Return the claims with their verdicts, then each arm's figures as mean ± standard deviation."""
    lines = [f"# {outcome.title}", ""]
    lines += [f"- {note}" for note in outcome.notes]
    lines += [f"- command: `{outcome.command}`, {outcome.elapsed_s:.0f} s on the machine below"]
    lines += [f"- {name}: {text}" for name, text in machine.items()]
    lines += ["", "| claim | figure | difference, 95 % interval | seeds in direction | verdict |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for verdict in verdicts:
        claim = verdict.claim
        lines += [
            f"| {claim.text} | {_cell(claim.figure)}: {claim.arm} − {claim.against} | "
            f"{verdict.mean_difference:+.3g} ± {verdict.interval:.2g} | "
            f"{verdict.num_in_direction} of {verdict.num_seeds} | "
            f"{'shown' if verdict.is_shown else 'NOT shown'} |"
        ]
    arms = list(dict.fromkeys(trial.arm for trial in outcome.trials))
    figures = list(dict.fromkeys(name for trial in outcome.trials for name in trial.figures))
    lines += ["", f"| figure | {' | '.join(arms)} |", f"| --- |{' --- |' * len(arms)}"]
    for name in figures:
        cells = []
        for arm in arms:
            found = [t.figures[name] for t in outcome.trials if t.arm == arm and name in t.figures]
            cells.append(f"{number(fmean(found))} ± {stdev(found):.2g}" if len(found) > 1 else "")
        lines += [f"| {_cell(name)} | {' | '.join(cells)} |"]
    lines += [
        "",
        "Differences are taken seed by seed; a claim is shown when the 95 % interval of their mean, by "
        "Student's t, lies wholly on the claimed side of 0, or wholly within the margin. Figures of arms are "
        "means over seeds ± standard deviation. Every trial is in the JSON file.",
    ]
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    """Return a figure's name as a table takes it: |x| holds what would end the cell."""
    return name.replace("|", "\\|")
