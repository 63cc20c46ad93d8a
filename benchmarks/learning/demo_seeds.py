"""Whether the demo's win is one at every seed: `glm-rlhf demo` from seed 0 to 4, as it is.

python -m benchmarks.learning.demo_seeds [--folder outputs/demo_seeds]

A seed whose figures lie in the folder already is not run again: remove the folder after a change.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks import RESULTS
from benchmarks.harness.command import parse
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import facts, table, write_files
from glm_rlhf.engine.commands.demo.report import RESULTS_NAME

SEEDS = (0, 1, 2, 3, 4)
COMMAND = "python -m benchmarks.learning.demo_seeds"
_COLUMNS = (
    ("greedy accuracy, SFT", "results/greedy_accuracy/sft/mean"),
    ("PPO", "results/greedy_accuracy/ppo/mean"),
    ("sampled accuracy, SFT", "results/sampled_accuracy/sft/mean"),
    ("PPO", "results/sampled_accuracy/ppo/mean"),
    ("win rate, greedy", "results/greedy_win_rate/mean"),
    ("win rate, sampled", "results/sampled_win_rate/mean"),
    ("canary, SFT", "results/canary_accuracy/sft/mean"),
    ("PPO", "results/canary_accuracy/ppo/mean"),
    ("KL, nats an answer", "results/kl/mean"),
    ("length, SFT", "results/length/sft/mean"),
    ("PPO", "results/length/ppo/mean"),
    ("reward model, pairs", "reward/pair_accuracy"),
    ("seconds", "timing_s/all"),
)
"""Head of each column, and the keys of its figure in a run's results."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the report and return the exit status: 1 where a seed is no clear win."""
    options = parse(arguments, doc=__doc__, options={"folder": (Path("outputs/demo_seeds"), "of the runs")})
    runs = [_facts(options.folder / f"seed_{seed}", seed) for seed in SEEDS]
    machine = description(torch.device("cpu"), has_cuda_columns=False)
    content = {"command": COMMAND, "machine": machine, "seeds": runs}
    write_files(RESULTS / "demo_cpu", as_markdown(runs, machine), content)
    return 0 if all(_is_as_claimed(run) for run in runs) else 1


def as_markdown(runs: Sequence[dict], machine: dict[str, str]) -> str:
    """Return one row per seed, and mean ± standard deviation over seeds."""
    num_wins = sum(run["is_clear_win"] for run in runs)
    num_alike = sum(all(check["is_alike"] for check in run["checks"]) for run in runs)
    results = runs[0]["results"]
    rows = [[str(run["seed"]), *(_cell(_value(run, keys)) for _, keys in _COLUMNS)] for run in runs]
    columns = [[_value(run, keys) for run in runs] for _, keys in _COLUMNS]
    rows.append(["mean ± sd", *(f"{_cell(fmean(values))} ± {_cell(stdev(values))}" for values in columns)])
    lines = [
        "# The demo from seed to seed",
        "",
        f"- A clear win (greedy and sampled accuracy each 20 points up, or doubled) at {num_wins} of "
        f"{len(runs)} seeds; answers alike in every layout and in transformers at {num_alike}.",
        "- SFT is the policy that PPO starts from, as it is. PPO's reward is a reward model that learned "
        "pairs of the policy's own answers, minus that of the reference's answer; no rule takes part.",
        f"- Figures are over {results['greedy_accuracy']['ppo']['num_units']} held-out sums and "
        f"{results['canary_accuracy']['ppo']['num_units']} held-out prompts of the task that is never "
        "rewarded (canary); numbers that are held out are learned from by no model. Each figure's 95 % "
        "interval is in the JSON file.",
        f"- command: `{COMMAND}`",
        *facts(machine),
        "",
        *table(("seed", *(name for name, _ in _COLUMNS)), rows),
    ]
    return "\n".join(lines) + "\n"


def _value(run: dict, keys: str) -> float:
    for key in keys.split("/"):
        run = run[key]
    return run


def _facts(folder: Path, seed: int) -> dict:
    """Return the figures that a run of the demo wrote, after running it where it has not been."""
    path = folder / RESULTS_NAME
    if not path.exists() or "results" not in json.loads(path.read_text(encoding="utf-8")):
        command = [sys.executable, "-m", "glm_rlhf.engine", "demo"]
        command += [f"run.seed={seed}", f"run.output={folder}"]
        subprocess.run(command, check=False)  # its code is in the checks
    return json.loads(path.read_text(encoding="utf-8"))


def _is_as_claimed(run: dict) -> bool:
    return run["is_clear_win"] and all(check["is_alike"] for check in run["checks"])


def _cell(value: float) -> str:
    return f"{value:.3f}" if value < 20 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
