"""PPO's iterations with answers scored as they end and with all scored at the end, in turns.

python -m benchmarks.training.interleaving
"""

import functools
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.generation.mixes import (
    LONGEST_ANSWER,
    MAX_BATCH,
    PAGE_SIZE,
    SHAPE,
    Mix,
    mixes,
    random_model,
)
from benchmarks.harness.command import Benchmark, errors_exceed
from benchmarks.harness.peer_model import shape_text
from benchmarks.harness.stages import on_stages
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.config.rl import PPOSection
from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rewards.distributed import RewardDispatcher
from glm_rlhf.engine.rewards.function import RewardFunction, RewardRequest
from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.types import Experience, PromptInput
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.load import load_model

ANSWER_S, CALL_S, COMPUTED_S = 0.01, 0.3, 0.004
AS_THEY_END, AT_THE_END = "as they end", "at the end"
_MICRO_BATCH_TOKENS = 2048
_PHASES = ("generate", "experience", "update")
_WARM_UP = 1  # untimed iterations of each contender


def sleeps_an_answer(requests: Sequence[RewardRequest]) -> list[float]:
    """Wait for each answer, as for a judge that takes one at a time."""
    time.sleep(ANSWER_S * len(requests))
    return no_wait(requests)


def sleeps_a_call(requests: Sequence[RewardRequest]) -> list[float]:
    """Wait once a call, as for a server with room for all."""
    time.sleep(CALL_S)
    return no_wait(requests)


def computes(requests: Sequence[RewardRequest]) -> list[float]:
    """Keep Python busy for each answer, as a parser does."""
    for _ in requests:
        end = time.thread_time() + COMPUTED_S
        while time.thread_time() < end:
            pass
    return no_wait(requests)


def no_wait(requests: Sequence[RewardRequest]) -> list[float]:
    """Return the share of each answer's ids in the lower half of the vocabulary."""
    half = SHAPE["vocab_size"] // 2
    return [sum(t < half for t in r.response_tokens) / len(r.response_tokens) for r in requests]


REWARDS: dict[str, tuple[RewardFunction, str]] = {
    "slow, one at a time": (sleeps_an_answer, f"a function that waits {ANSWER_S * 1e3:.0f} ms an answer"),
    "slow, all at once": (sleeps_a_call, f"a function that waits {CALL_S * 1e3:.0f} ms a call"),
    "busy": (computes, f"a function that computes {COMPUTED_S * 1e3:.0f} ms an answer in Python"),
}


def measure(options: Namespace) -> list[Row]:
    """Return the rows of each pipeline; times are those of its first rank."""
    with tempfile.TemporaryDirectory() as folder:
        random_model().save_pretrained(folder)
        return [
            row
            for stages in options.stages
            for row in on_stages(rows_of, stages, folder, options.iterations)[0]
        ]


def rows_of(topology: Topology, folder: str, iterations: int) -> list[Row]:
    """Return the rows of one rank; the others run beside it."""
    num_stages = topology.world_size
    roles = _roles(folder, topology)
    layout = "one rank" if num_stages == 1 else f"pp {num_stages}"
    tasks = []
    for name, (function, what) in REWARDS.items() if num_stages == 1 else ():
        ways = {AS_THEY_END: 1, AT_THE_END: 0}
        tasks.append((name, what, {way: partial(_judged, roles, function, n) for way, n in ways.items()}))
    ways = {AS_THEY_END: partial(_scored, roles, True), AT_THE_END: partial(_scored, roles, False)}
    tasks.append(("models", "reference, critic and reward model", ways))
    return [_row(f"{name}, {layout}", what, roles, ways, iterations) for name, what, ways in tasks]


def _row(
    name: str, what: str, roles: PPORoles, contenders: dict[str, Callable[[], None]], iterations: int
) -> Row:
    """Time iterations of both in turns, from the same random numbers; weights hardly move."""
    seconds = {contender: [] for contender in contenders}
    errors = dict.fromkeys(contenders, 0.0)
    progress = roles.progress()
    for number in range(_WARM_UP + iterations):
        experiences = {}
        for contender in list(contenders) if number % 2 else reversed(contenders):
            contenders[contender]()
            roles.set_progress(progress | {"num_answered": progress["num_answered"] + number})
            phases_s, experiences[contender] = _iteration(roles)
            if number >= _WARM_UP:
                seconds[contender].append(phases_s)
        for contender, experience in experiences.items():
            error = _distance(experience, experiences[AT_THE_END])
            errors[contender] = max(errors[contender], error)
    return Row(
        row=name,
        what=f"an iteration of PPO, scored by {what}",
        shape=f"{len(_mix().prompts)} answers, long tail up to {LONGEST_ANSWER} tokens, fp32",
        command="python -m benchmarks.training.interleaving",
        entries=[
            Entry(
                name=contender,
                timing=summary([sum(run.values()) for run in runs]),
                error=errors[contender],
                figures={
                    f"{phase} ms": 1e3 * summary([run[f"timing_s/{phase}"] for run in runs]).median_s
                    for phase in _PHASES
                },
            )
            for contender, runs in seconds.items()
        ],
    )


def _iteration(roles: PPORoles) -> tuple[dict[str, float], Experience]:
    prompts = [PromptInput(tokens=prompt, extra={}) for prompt in _mix().prompts]
    dist.barrier()
    phases = Phases()
    with phases.phase("generate"):
        rollouts = roles.generate(prompts)
    with phases.phase("experience"):
        experience = roles.make_experience(rollouts)
    with phases.phase("update"):
        roles.update(experience)
    return phases.seconds, experience


def _distance(experience: Experience, expected: Experience) -> float:
    """Return the largest difference of rewards, reference logprobs and values."""
    assert torch.equal(experience.rollouts.tokens_T, expected.rollouts.tokens_T)
    names = ("rewards_B", "ref_logprobs_T", "values_T")
    return max(float((getattr(experience, name) - getattr(expected, name)).abs().max()) for name in names)


def _judged(roles: PPORoles, function: RewardFunction, concurrency: int) -> None:
    roles.algorithm = PPO(PPOSection(overlap_scoring=False))
    roles.rewards.dispatcher = RewardDispatcher(
        function, topology=roles.topology, tokenizer=None, skip_failures=False, concurrency=concurrency
    )


def _scored(roles: PPORoles, overlap_scoring: bool) -> None:
    roles.algorithm = PPO(PPOSection(overlap_scoring=overlap_scoring))
    roles.rewards.dispatcher = None


def _roles(folder: str, topology: Topology) -> PPORoles:
    load = partial(load_model, folder, topology, dtype=torch.float32, seed=7)
    models = {role: load(role=role)[0] for role in ("policy", "reference", "critic", "reward")}
    still = AdamSettings(lr=1e-12)  # so that both contenders give the same answers and scores
    states = {role: training_state(models[role], still, topology=topology) for role in ("policy", "critic")}
    return PPORoles(
        topology=topology,
        models=models,
        states=states,
        rewards=CombinedReward(
            topology=topology, micro_batch_tokens=_MICRO_BATCH_TOKENS, model=models["reward"]
        ),
        algorithm=PPO(PPOSection()),
        answers=AnswerSettings(
            sampling=SamplingSettings(temperature=1.0),
            generation=GenerationSection(
                max_batch=MAX_BATCH,
                max_step_tokens=1024,
                page_size=PAGE_SIZE,
                max_new_tokens=LONGEST_ANSWER,
            ),
            stop_ids=frozenset(),
            stop_check=_is_long_enough,
        ),
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        seed=3,
    )


def _is_long_enough(tokens: Sequence[int]) -> bool:
    """Return whether an answer ends here: its first id draws its length from the long-tailed mix."""
    lengths = _mix().lengths
    return len(tokens) >= lengths[tokens[0] % len(lengths)]


@functools.cache
def _mix() -> Mix:
    """Return the long-tailed mix."""
    return mixes()[-1]


def _verdict(rows: Sequence[Row]) -> str:
    """Return the verdict of each row, in one sentence."""
    said = []
    for row in rows:
        early, late = (entry.timing.median_s for entry in row.entries)
        said.append(f"{row.row}: {late * 1e3:.0f} → {early * 1e3:.0f} ms ({late / early:.2f} ×)")
    return "; ".join(said) + "."


BENCHMARK = Benchmark(
    doc=__doc__,
    name="interleaving_cpu",
    title="Scoring answers as they end, CPU",
    options={"iterations": (8, "of each contender in a row"), "stages": ([1, 2], "pipelines")},
    measure=measure,
    verdict=_verdict,
    claim=lambda verdict: (
        "An iteration in which answers are scored while others are generated, against one that scores "
        f"them when all have ended, medians: {verdict}"
    ),
    notes=(
        f"all models: GLM of {shape_text(SHAPE)}; random weights",
        "both contenders of a row give the same answers, from the same random numbers; `error` is the "
        "largest difference of rewards, reference logprobs and values from those scored at the end",
        "one epoch, one mini-batch; times of the first rank; one thread a rank",
        "on one rank models score nothing early: a single stage has no idle turn, so both contenders do "
        "the same, and the difference is the noise of the measurement",
    ),
    fails=errors_exceed(1e-4),
)

if __name__ == "__main__":
    BENCHMARK.run()
