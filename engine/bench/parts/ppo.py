"""A whole iteration of PPO with four roles on this rank, by phase."""

import itertools
import time
from collections.abc import Callable, Sequence

import torch

from glm_rlhf.engine.bench.full_length import full_length_answers, full_length_work, random_prompts
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.bench.sizes import Sizes
from glm_rlhf.engine.config.rl import PPOSection
from glm_rlhf.engine.cost.workload import Choice, Workload
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.load import randomize_weights

PHASES = ("generate", "score", "critic", "policy")
"""Of an iteration, in their order; `score` is rewards, logprobs, values and advantages."""
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_WARM_UP = 2
_LEAST_RUNS, _MOST_RUNS = 5, 50


def make_roles(
    topology: Topology,
    *,
    model: GLMConfig,
    work: Workload,
    choice: Choice,
    fill: Callable[..., None] = randomize_weights,
) -> PPORoles:
    """Return four roles of one shape with weights at random, whose answers are all of full length.

    `fill` draws them, called with a role's chunks and `seed`.
    """
    models = {}
    for index, role in enumerate(("policy", "critic", "reference", "reward")):
        recomputes = choice.recompute_layers and role in ("policy", "critic")
        models[role] = build_model(
            model, topology, role=role, dtype=_DTYPES[work.itemsize], recompute_layers=recomputes
        )
        fill(models[role], seed=index)
    states = {
        role: training_state(models[role], AdamSettings(lr=1e-5), topology=topology)
        for role in ("policy", "critic")
    }
    tokens = choice.micro_batch_tokens
    return PPORoles(
        topology=topology,
        models=models,
        states=states,
        rewards=CombinedReward(topology=topology, micro_batch_tokens=tokens, model=models["reward"]),
        algorithm=PPO(PPOSection(epochs=work.epochs, minibatches=work.minibatches)),
        answers=full_length_answers(
            new_tokens=work.max_new_tokens,
            max_batch=work.max_batch,
            max_step_tokens=work.max_step_tokens,
            page_size=work.page_size,
            num_samples=work.num_samples,
        ),
        micro_batch_tokens=tokens,
        seed=3,
    )


def ppo_row(sizes: Sizes, topology: Topology, *, budget_s: float, command: str) -> Row:
    """Return the row of an iteration, the median of each phase in the columns behind its time."""
    work = full_length_work(
        prompt_tokens=sizes.prompt_tokens,
        new_tokens=sizes.new_tokens,
        num_prompts=sizes.num_prompts,
        max_step_tokens=8192,
        itemsize=sizes.dtype.itemsize,
    )
    choice = Choice(layout=Layout(), micro_batch_tokens=8 * work.longest, recompute_layers=False)
    roles = make_roles(topology, model=sizes.model, work=work, choice=choice)
    prompts = random_prompts(sizes.model, work)
    runs: list[dict[str, float]] = []
    started = time.perf_counter()
    while len(runs) < _WARM_UP + _LEAST_RUNS or (
        time.perf_counter() - started < budget_s and len(runs) < _WARM_UP + _MOST_RUNS
    ):
        runs.append(iteration_s(roles, prompts, topology))
    return Row(
        row="ppo",
        what="an iteration of PPO: answers, rewards and logprobs of four roles, one update of two",
        shape=f"{work.num_prompts} prompts of {work.max_prompt_tokens} tokens, {work.max_new_tokens} new "
        "tokens each",
        command=command,
        entries=[phases_entry(runs[_WARM_UP:])],
        work=(float(work.num_prompts), "samples"),
    )


def phases_entry(runs: Sequence[dict[str, float]]) -> Entry:
    """Return the time of iterations, and the median of each phase, of what `iteration_s` gave."""
    timings = {phase: summary([run[phase] for run in runs]) for phase in PHASES}
    return Entry(
        name="ours",
        timing=summary([sum(run.values()) for run in runs]),
        figures={f"{phase} ms": 1e3 * timing.median_s for phase, timing in timings.items()},
    )


def iteration_s(roles: PPORoles, prompts: Sequence[PromptInput], topology: Topology) -> dict[str, float]:
    """Return the seconds of each phase of an iteration, the device waited for behind each."""
    marks = [_now(topology)]
    rollouts = roles.generate(prompts)
    marks.append(_now(topology))
    experience = roles.make_experience(rollouts)
    marks.append(_now(topology))
    metrics = roles.update(experience)
    marks.append(_now(topology))
    generate_s, score_s, update_s = (end - start for start, end in itertools.pairwise(marks))
    critic_s = metrics["timing_s/critic"]  # the host's, which waits for the device at the end of a step
    return dict(zip(PHASES, (generate_s, score_s, critic_s, update_s - critic_s), strict=True))


def _now(topology: Topology) -> float:
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)
    return time.perf_counter()
