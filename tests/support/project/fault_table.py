"""The fault table: faults per phase and rank of a PPO run, what each must lead to, and how it is tried."""

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from faulty_run import SUSPENSION_S, Fault
from reward_rules import SlowOnce, share_of_low_ids
from safetensors.torch import load_file
from tiny_models import make_model, save_folder
from tiny_ppo_line import ppo_line
from warm_launches import WarmLaunches

from examples.reward_server import make_server
from glm_rlhf.engine.rewards.function import RewardFunction

DEADLINE_S = 30.0
WATCHDOG_S = 8.0
SLOW_S = 25.0
NUM_ANSWERS = 8
"""Of an iteration of `ppo_line`, with those of the reference."""
SOON_S = 5.0
ENDED_WELL = ("rank 0 returned 0", "rank 1 returned 0")
PHASES = ("generate", "reward", "old_logprobs", "critic", "policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a fault must lead to."""

    promise: str
    """For the report."""
    is_success: bool = False
    """Whether torchrun returns 0."""
    deadline_s: float = math.inf
    """From the fault to the end of every process."""
    said: tuple[str, ...] = ()
    """Required in stderr, regular expressions; `{rank}` is the failing rank, `{other}` the other one."""
    has_same_bits: bool = False
    """Whether the final weights are those of the unfaulted run."""
    has_same_gradients: bool = False
    """Whether the second iteration's gradient norms are the unfaulted run's, to 1e-6 of them."""
    resumes: bool = False
    """Whether the same command is run once more, and resumes."""
    num_restarts: int = 0
    """Of torchrun."""


ENDED = Promise(
    promise="all ranks dead, the rank named, the phase reported in which the other lost it",
    deadline_s=DEADLINE_S,
    said=(r"rank +: {rank} ", r"\[rank {other}\] glm-rlhf ppo: failed in phase \S+: "),
)
REPORTED = Promise(
    promise="all ranks dead, the rank reported in one line", deadline_s=DEADLINE_S, said=(r"rank {rank}\D",)
)
FOUND = Promise(
    promise=f"found by the watchdog ({WATCHDOG_S:g} s), stacks dumped",
    deadline_s=WATCHDOG_S + 10,
    said=(r"\[rank \d\] hung for \d+ s in phase .*(?s:.)*most recent call first",),
)
STOPPED = Promise(
    promise=f"found by the other rank's watchdog ({WATCHDOG_S:g} s), which names and kills the stopped one",
    deadline_s=WATCHDOG_S + 10,
    said=(*FOUND.said, r"\[rank {other}\] rank {rank} was stopped"),
)
LEFT = Promise(
    promise="saved and exited with 0; the same command resumes to the unfaulted run's bits",
    is_success=True,
    said=("as a signal asked",),
    has_same_bits=True,
    resumes=True,
)
LEFT_SOON = Promise(
    promise=f"saved and exited with 0 within {SOON_S:g} s; it resumes to the unfaulted run's bits",
    is_success=True,
    deadline_s=SOON_S,
    said=("as a signal asked",),
    has_same_bits=True,
    resumes=True,
)
ALL_LEFT = Promise(
    promise="what torchrun passes on changes nothing: saved, each rank returns 0; the same command "
    "resumes to the unfaulted run's bits",
    said=("as a signal asked", *ENDED_WELL),
    has_same_bits=True,
    resumes=True,
)
ORPHANED = Promise(
    promise="the ranks find that torchrun was killed, save and end; the same command resumes to the same "
    "bits",
    deadline_s=60.0,
    said=("torchrun has ended without its ranks", "as a signal asked", *ENDED_WELL),
    has_same_bits=True,
    resumes=True,
)
CONTINUED = Promise(
    promise=f"stopped for {SUSPENSION_S:g} s, longer than the watchdog allows, the job continues to the "
    "unfaulted run's bits",
    is_success=True,
    said=(r"\[rank 0\] did not run for \d+ s", r"\[rank 1\] did not run for \d+ s"),
    has_same_bits=True,
)
DONE = Promise(promise="the run continues to the unfaulted run's bits", is_success=True, has_same_bits=True)
SPLIT = Promise(
    promise="micro-batches split on all ranks, gradient norms equal within 1e-6, the run continues",
    is_success=True,
    said=(r"\[rank {rank}\] out of memory in a micro-batch of \d+ tokens, [\w ]+, (training|forward)",),
    has_same_gradients=True,
)
ALONE = Promise(
    promise="of two ranks that share layers: all dead, the rank and what to lower named",
    deadline_s=DEADLINE_S,
    said=(
        r"out of memory on rank {rank} .* but not on its tensor- and context-parallel peers"
        r".*micro_batch_tokens",
    ),
)
SKIPPED = Promise(
    promise="no step on any rank, the rank and its answers named, the run continues",
    is_success=True,
    said=(r"iteration 2 was skipped .* on rank {rank} the critic's loss on answers \d",),
)
RESTARTED = Promise(
    promise="torchrun --max-restarts=1 resumes from the last checkpoint to the unfaulted run's bits",
    is_success=True,
    said=("the run resumes from .*step_1",),
    has_same_bits=True,
    num_restarts=1,
)
FELL_BACK = Promise(
    promise="restarted, the run refuses the damaged checkpoint and resumes from the previous one, same bits",
    is_success=True,
    said=("step_2", "the run resumes from .*step_1"),
    has_same_bits=True,
    num_restarts=1,
)
REFUSED = Promise(
    promise="asked again, then all ranks end and the answers without a reward are named",
    deadline_s=DEADLINE_S,
    said=(r"gave none in \d attempts, the last error: ConnectionRefusedError", r"rank {rank}\D"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault, and what it must lead to."""

    row: int
    """In the reliability table."""
    fault: Fault
    """The fault."""
    promise: Promise
    """Its required consequence."""
    settings: tuple[str, ...] = ()
    """More arguments of the command."""


def _case(
    row: int, kind: str, phase: str, rank: int, promise: Promise, *settings: str, time: int = 2
) -> Case:
    fault = Fault(kind=kind, phase=phase, rank=rank, time=time)
    return Case(row=row, fault=fault, promise=promise, settings=settings)


SERVER = "reward.function={server}"
SLOW_SERVER = "reward.function={slow_server}"
CASES = (
    *(_case(9, "kill", phase, rank, ENDED) for phase in PHASES for rank in (0, 1)),
    _case(9, "kill", "save", 1, ENDED, "train.save_every=1"),
    _case(9, "segfault", "generate", 1, ENDED),
    _case(9, "abort", "policy", 1, ENDED),
    _case(9, "exit", "values", 1, ENDED),
    _case(9, "exception", "reference", 1, REPORTED),
    _case(9, "bad value", "reward", 0, REPORTED),
    _case(10, "hang", "generate", 1, FOUND),
    _case(10, "hang", "policy", 0, FOUND),
    _case(10, "stop", "critic", 1, STOPPED),
    _case(10, "slow", "generate", 1, DONE),
    _case(11, "kill", "policy", 1, RESTARTED),
    _case(11, "segfault", "generate", 0, RESTARTED),
    *(_case(12, "SIGTERM", phase, rank, LEFT) for phase in PHASES for rank in (0, 1)),
    _case(12, "SIGUSR1", "generate", 0, LEFT),
    _case(12, "SIGUSR1", "save", 1, LEFT),
    *(_case(25, "SIGTERM", "reward", rank, LEFT_SOON, SLOW_SERVER) for rank in (0, 1)),
    _case(12, "Ctrl-C", "generate", 1, LEFT),
    _case(12, "Ctrl-C", "policy", 0, LEFT),
    *(_case(19, "SIGTERM to the job", phase, rank, ALL_LEFT) for phase in PHASES for rank in (0, 1)),
    *(_case(20, "lost launcher", phase, 0, ORPHANED) for phase in ("generate", "policy")),
    *(_case(26, "suspended job", phase, 0, CONTINUED, "run.watchdog_s=4") for phase in PHASES),
    _case(7, "disk full", "save", 0, REPORTED),
    _case(7, "slow disk", "save", 1, DONE, "train.save_every=1"),
    _case(5, "corrupt file", "policy", 0, FELL_BACK, "train.export_every=1", time=3),
    _case(13, "NaN", "critic", 1, SKIPPED),
    _case(14, "little memory", "values", 1, SPLIT),
    _case(14, "little memory", "policy", 0, SPLIT),
    _case(14, "little memory", "policy", 1, ALONE, "parallel.tp=2"),
    _case(14, "out of memory", "save", 1, REPORTED),
    _case(15, "lost reward server", "generate", 1, REFUSED, SERVER),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a case."""

    case: Case
    """The case."""
    seconds: float
    """From the fault to the end of torchrun and its ranks."""
    failure: str
    """The unmet requirement; empty if all hold."""


def try_all(folder: Path) -> list[Outcome]:
    """Return the outcome of each case, in runs under `folder`."""
    line = ppo_line(save_folder(folder / "model", "glm", make_model("glm")), folder)
    outcomes = []
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(_served(share_of_low_ids))
        launch = stack.enter_context(WarmLaunches())
        code, said, _ = launch(Fault(), [*line, f"run.output={folder / 'wanted'}"], timeout_s=100)
        assert code == 0, said
        for number, case in enumerate(CASES):
            addresses, slow = {"server": address}, SlowOnce(NUM_ANSWERS, SLOW_S)
            if SLOW_SERVER in case.settings:
                addresses["slow_server"] = stack.enter_context(_served(slow))
            settings = [setting.format(**addresses) for setting in case.settings]
            arguments = [*line, f"run.watchdog_s={WATCHDOG_S}", *settings]
            seconds, failure = _try(launch, case, arguments, folder / str(number), folder / "wanted")
            if SLOW_SERVER in case.settings and not slow.was_slow:
                failure = failure or "the server was not slow"
            outcomes.append(Outcome(case=case, seconds=seconds, failure=failure))
    return outcomes


@contextlib.contextmanager
def _served(rule: RewardFunction) -> Iterator[str]:
    """Serve a reward function; gives its address."""
    server = make_server(rule, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _try(launch: WarmLaunches, case: Case, line: list[str], output: Path, wanted: Path) -> tuple[float, str]:
    fault, promise = case.fault, case.promise
    arguments = [*line, f"run.output={output}"]
    if promise.num_restarts:
        arguments += ["train.save_every=1", "train.async_save=false"]
    try:
        code, said, seconds = launch(fault, arguments, timeout_s=100, num_restarts=promise.num_restarts)
        if math.isnan(seconds):
            return seconds, "the fault never occurred"
        if (code == 0) != promise.is_success:
            return seconds, f"torchrun returned {code}: {said[-3000:]}"
        if seconds > promise.deadline_s:
            return seconds, f"later than {promise.deadline_s:g} s"
        for pattern in promise.said:
            pattern = pattern.replace("{rank}", str(fault.rank)).replace("{other}", str(1 - fault.rank))
            if not re.search(pattern, said):
                return seconds, f"not said: {pattern}: {said[-3000:]}"
        if promise.resumes:
            code, said, _ = launch(Fault(), arguments, timeout_s=100)
            if code != 0:
                return seconds, f"resuming returned {code}: {said[-3000:]}"
    except (AssertionError, TimeoutError) as error:
        return math.nan, str(error)[-3000:]
    if promise.has_same_bits and not _have_same_bits(_weights(output), _weights(wanted)):
        return seconds, "other weights than the unfaulted run's"
    if promise.has_same_gradients:
        distance = max(abs(a / b - 1) for a, b in zip(_norms(output), _norms(wanted), strict=True))
        if not distance <= 1e-6:
            return seconds, f"gradient norms {distance:.1e} from the unfaulted run's"
    return seconds, ""


def _weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "hf" / "step_3").glob("*.safetensors")
    return load_file(file)


def _have_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _norms(output: Path) -> list[float]:
    """Return the gradient norms of policy and critic in the second iteration."""
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return [one[f"{name}/grad_norm"] for one in metrics if one["step"] == 2 for name in ("actor", "critic")]
