"""Whether the demo's win is one at every seed: `glm-rlhf demo` from seed 0 to 4, as it is.

python -m benchmarks.learning.demo_seeds [--folder outputs/demo_seeds]

A seed whose figures lie in the folder already is not run again: remove the folder after a change.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

from benchmarks import RESULTS
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.commands.demo.report import RESULTS_NAME

SEEDS = (0, 1, 2, 3, 4)
COMMAND = "python -m benchmarks.learning.demo_seeds"
_COLUMNS: tuple[tuple[str, Callable[[dict], float]], ...] = (
    ("greedy accuracy, SFT", lambda facts: facts["results"]["greedy_accuracy"]["sft"]["mean"]),
    ("PPO", lambda facts: facts["results"]["greedy_accuracy"]["ppo"]["mean"]),
    ("sampled accuracy, SFT", lambda facts: facts["results"]["sampled_accuracy"]["sft"]["mean"]),
    ("PPO", lambda facts: facts["results"]["sampled_accuracy"]["ppo"]["mean"]),
    ("win rate, greedy", lambda facts: facts["results"]["greedy_win_rate"]["mean"]),
    ("win rate, sampled", lambda facts: facts["results"]["sampled_win_rate"]["mean"]),
    ("canary, SFT", lambda facts: facts["results"]["canary_accuracy"]["sft"]["mean"]),
    ("PPO", lambda facts: facts["results"]["canary_accuracy"]["ppo"]["mean"]),
    ("KL, nats an answer", lambda facts: facts["results"]["kl"]["mean"]),
    ("length, SFT", lambda facts: facts["results"]["length"]["sft"]["mean"]),
    ("PPO", lambda facts: facts["results"]["length"]["ppo"]["mean"]),
    ("reward model, pairs", lambda facts: facts["reward"]["pair_accuracy"]),
    ("seconds", lambda facts: facts["timing_s"]["all"]),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the report and return the exit status: 1 where a seed is no clear win."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/demo_seeds"), help="of the runs")
    folder = parser.parse_args(arguments).folder
    found = [_facts(folder / f"seed_{seed}", seed) for seed in SEEDS]
    machine = description(torch.device("cpu"))
    machine.pop("CUDA", None)  # nothing here is a matter of a GPU's speed
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo_cpu.md").write_text(as_markdown(found, machine), encoding="utf-8")
    content = {"command": COMMAND, "machine": machine, "seeds": found}
    (RESULTS / "demo_cpu.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return 0 if all(_is_as_claimed(facts) for facts in found) else 1


def as_markdown(found: Sequence[dict], machine: dict[str, str]) -> str:
    """Return one row a seed, and mean ± standard deviation over seeds."""
    num_wins = sum(facts["is_clear_win"] for facts in found)
    num_alike = sum(all(check["is_alike"] for check in facts["checks"]) for facts in found)
    results = found[0]["results"]
    lines = [
        "# The demo from seed to seed",
        "",
        f"- A clear win (greedy and sampled accuracy each 20 points up, or doubled) at {num_wins} of "
        f"{len(found)} seeds; answers alike in every layout and in transformers at {num_alike}.",
        "- SFT is the policy that PPO starts from, as it is. PPO's reward is a reward model that learned "
        "pairs of the policy's own answers, less that of the reference's answer; no rule takes part.",
        f"- Figures are over {results['greedy_accuracy']['ppo']['num_units']} held-out sums and "
        f"{results['canary_accuracy']['ppo']['num_units']} held-out prompts of the task that is never "
        "rewarded (canary); numbers that are held out are learned from by no model. Each figure's 95 % "
        "interval is in the JSON file.",
        f"- command: `{COMMAND}`",
        *(f"- {name}: {text}" for name, text in machine.items()),
        "",
        f"| seed | {' | '.join(name for name, _ in _COLUMNS)} |",
        f"| --- |{' --- |' * len(_COLUMNS)}",
    ]
    for facts in found:
        lines.append(f"| {facts['seed']} | {' | '.join(_cell(value(facts)) for _, value in _COLUMNS)} |")
    spreads = [[value(facts) for facts in found] for _, value in _COLUMNS]
    cells = [f"{_cell(fmean(values))} ± {_cell(stdev(values))}" for values in spreads]
    return "\n".join([*lines, f"| mean ± sd | {' | '.join(cells)} |"]) + "\n"


def _facts(folder: Path, seed: int) -> dict:
    """Return what a run of the demo says of itself, after running it where it has not been."""
    path = folder / RESULTS_NAME
    if not path.exists() or "results" not in json.loads(path.read_text(encoding="utf-8")):
        command = [
            sys.executable,
            "-m",
            "glm_rlhf.engine",
            "demo",
            f"run.seed={seed}",
            f"run.output={folder}",
        ]
        subprocess.run(command, check=False)  # its code is in the checks
    return json.loads(path.read_text(encoding="utf-8"))


def _is_as_claimed(facts: dict) -> bool:
    return facts["is_clear_win"] and all(check["is_alike"] for check in facts["checks"])


def _cell(value: float) -> str:
    return f"{value:.3f}" if value < 20 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
