"""One rank of a PPO run under torchrun meets a fault: kinds, phases and ranks, and a report of what held."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from faulty_run import launch
from safetensors.torch import load_file
from tiny_models import make_model, save_folder
from tiny_ppo_line import ppo_line

from glm_rlhf.engine.bench.machine import description

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "reliability_cpu.md"
DEADLINE_S = 30.0
WATCHDOG_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a fault must lead to."""

    words: str
    """For the report."""
    is_success: bool = False
    """Whether torchrun returns 0."""
    deadline_s: float = DEADLINE_S
    """From the fault to the end of every process."""
    said: str = ""
    """What stderr has to say, a regular expression."""


ENDED = Promise(words="all ranks dead, the rank and the phase named")
TOLD = Promise(words="all ranks dead, the rank told by one line", said=r"rank {rank}\D")
FOUND = Promise(
    words=f"found by the watchdog ({WATCHDOG_S:g} s), stacks dumped",
    deadline_s=WATCHDOG_S + 10,
    said=r"\[rank \d\] hung for \d+ s in phase .*(?s:.)*most recent call first",
)
# torchrun sends a stopped rank SIGTERM, which waits, and SIGKILL 30 s later.
STOPPED = Promise(
    words="found by the other rank's watchdog; torchrun kills the stopped one 30 s later",
    deadline_s=WATCHDOG_S + 10 + 32,
    said=FOUND.said,
)
LEFT = Promise(
    words="saved and left, exit 0; the same command goes on to the unfaulted run's bits",
    is_success=True,
    deadline_s=math.inf,
    said="as a signal asked",
)
DONE = Promise(words="the run goes on to the unfaulted run's bits", is_success=True, deadline_s=math.inf)
RESTARTED = Promise(
    words="torchrun --max-restarts=1 goes on to the unfaulted run's bits",
    is_success=True,
    deadline_s=math.inf,
)

CASES = [
    ("kill", "generate", 0, ENDED),
    ("kill", "reward", 1, ENDED),
    ("kill", "values", 0, ENDED),
    ("kill", "critic", 1, ENDED),
    ("kill", "policy", 0, ENDED),
    ("kill", "save", 1, ENDED),
    ("segfault", "generate", 1, ENDED),
    ("abort", "policy", 1, ENDED),
    ("exit", "old_logprobs", 1, ENDED),
    ("exception", "reference", 1, TOLD),
    ("bad value", "reward", 0, TOLD),
    ("out of memory", "policy", 1, TOLD),
    ("disk full", "save", 0, TOLD),
    ("hang", "generate", 1, FOUND),
    ("hang", "policy", 0, FOUND),
    ("stop", "critic", 1, STOPPED),
    ("slow", "generate", 1, DONE),
    ("SIGTERM", "reward", 1, LEFT),
    ("SIGTERM", "policy", 0, LEFT),
    ("SIGUSR1", "generate", 0, LEFT),
    ("SIGUSR1", "save", 1, LEFT),
    ("kill", "policy", 1, RESTARTED),
]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "checkpoints" / "step_3").glob("*.safetensors")
    return load_file(file)


def are_equal(output: Path, wanted: dict[str, torch.Tensor]) -> bool:
    found = weights(output)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def meet(case: tuple, line: list[str], output: Path, wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the seconds to the end, and what did not hold; empty where all did."""
    kind, phase, rank, promise = case
    given = [*line, f"run.output={output}", f"run.watchdog_s={WATCHDOG_S}"]
    num_restarts = 1 if promise is RESTARTED else 0
    given += ["train.save_every=1"] if num_restarts else []
    code, said, seconds = launch(kind, phase, rank, given, timeout_s=100, num_restarts=num_restarts)
    if (code == 0) != promise.is_success:
        return seconds, f"torchrun returned {code}"
    if not seconds <= promise.deadline_s:
        return seconds, f"later than {promise.deadline_s:g} s"
    names = [promise.said.replace("{rank}", str(rank))]
    if promise is ENDED:
        names = [rf"rank\s*: {rank} ", rf"\[rank {1 - rank}\] glm-rlhf ppo: failed in phase \S*{phase}"]
    for words in names:
        if not re.search(words, said):
            return seconds, f"not said: {words}"
    if promise is LEFT:
        code, *_ = launch("slow", "never", rank, given, timeout_s=100)
        if code != 0:
            return seconds, f"going on returned {code}"
    if promise.is_success and not are_equal(output, wanted):
        return seconds, "other weights than the unfaulted run's"
    return seconds, ""


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_what_is_promised_of_each_fault_holds(tmp_path):
    start = time.monotonic()
    line = ppo_line(save_folder(tmp_path / "model", "glm", make_model("glm")), tmp_path)
    code, *_ = launch("slow", "never", 0, [*line, f"run.output={tmp_path / 'wanted'}"], timeout_s=100)
    assert code == 0
    wanted = weights(tmp_path / "wanted")
    rows, failures = [], []
    for number, case in enumerate(CASES):
        kind, phase, rank, promise = case
        seconds, failure = meet(case, line, tmp_path / str(number), wanted)
        failures += [f"{kind} in {phase}: {failure}"] if failure else []
        shown = "" if promise.is_success else f"{seconds:.1f}"
        rows.append(f"| {kind} | {phase} | {rank} | {promise.words} | {shown} | {failure or 'held'} |")
    write_report(rows, len(CASES) - len(failures), time.monotonic() - start)
    assert not failures, failures


def write_report(rows: list[str], num_held: int, elapsed_s: float) -> None:
    facts = "\n".join(f"- {name}: {value}" for name, value in description(torch.device("cpu")).items())
    REPORT.write_text(
        f"# Faults of one rank, CPU\n\n{num_held} of {len(rows)} promises held, in {elapsed_s:.0f} s, by "
        "`pytest -m soak tests/soak/test_fault_table.py`: PPO of a tiny GLM, 3 iterations on 2 gloo ranks "
        f"under torchrun; the fault meets one rank when the phase begins for the second time.\n\n{facts}\n"
        "- seconds: from the fault to the end of torchrun and all ranks\n\n"
        "| fault | phase | rank | promise | seconds | tried |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )
