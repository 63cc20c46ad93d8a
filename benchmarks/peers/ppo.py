"""Iterations of PPO against TRL's PPO, in turns: seconds, and rewards on the way.

python -m benchmarks.peers.ppo
"""

import contextlib
import gc
import importlib.util
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev

import torch

from benchmarks.harness.command import finish, parse
from benchmarks.harness.peer_model import shape_text
from benchmarks.harness.thread_counts import threads_text, with_threads
from benchmarks.peers.ppo_task import (
    ADAM_BETAS,
    CLIP,
    GAMMA,
    KL_COEF,
    LAM,
    LOW_IDS,
    LR,
    MAX_PROMPT_TOKENS,
    PROMPTS,
    REAL_SCALE,
    SHAPE,
    TASKS,
    PeerTask,
    Run,
    draw_prompts,
    save_models,
    share_of_low_ids,
)
from benchmarks.peers.ppo_trl import run_in_turns
from glm_rlhf.engine.bench.harness import Entry, summary
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import Report, Row
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.config.rl import (
    CriticSection,
    PPOConfig,
    PPOPromptsSection,
    PPOSection,
    PPOTrainSection,
)
from glm_rlhf.engine.config.sections import GenerationSection, ModelSection
from glm_rlhf.engine.config.training import OptimizerSection, TrainingRunSection
from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rewards.function import RewardRequest
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.types import PromptInput

TARGET_RATIO = 2.0
WARM_UP_ITERATIONS = 2
"""First iterations of a seed, which its times exclude; its rewards include them."""
_LAST = 3  # iterations at the end whose mean reward counts as reached


def reward(requests: Sequence[RewardRequest]) -> list[float]:
    """Return the rule's rewards; the reward function."""
    return [share_of_low_ids(request.response_tokens) for request in requests]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Both runs of one seed; `peer` is None where TRL is not installed."""

    engine: Run
    peer: Run | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where a target is missed."""
    options = parse(
        arguments,
        doc=__doc__,
        options={
            "threads": ([1, 2], "thread counts"),
            "seeds": (3, "seeds per thread count"),
            "iterations": (15, "iterations per seed"),
        },
        out="ppo_peers_cpu",
    )
    rows, sentences = [], []
    for threads in options.threads:
        name = threads_text(threads)
        command = f"python -m benchmarks.peers.ppo --threads {threads} --seeds {options.seeds}"
        for task in TASKS:
            seeds = with_threads(threads, measure_seeds, task, options.seeds, options.iterations)
            rows.append(row_of(name, task, seeds, f"{command} --iterations {options.iterations}"))
            sentences.append(f"{name}, {task.name}: {verdict(seeds)}")
    verdicts = " ".join(sentences)
    is_missed = any("missed" in sentence or "is worse" in sentence for sentence in sentences)
    return finish(report(rows, verdicts), options.out, verdicts, has_failed=is_missed)


def measure_seeds(task: PeerTask, num_seeds: int, iterations: int) -> list[Seed]:
    """Return the runs of this process with its thread count."""
    return [measure_seed(task, seed, iterations) for seed in range(num_seeds)]


def measure_seed(task: PeerTask, seed: int, iterations: int) -> Seed:
    """Run both from the same weights on the same prompts, an iteration of either in turn."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        save_models(folder, task, seed=seed)
        prompts = draw_prompts(task, seed)
        with contextlib.redirect_stderr(io.StringIO()), PPOEngine(_config(folder, task, seed)) as engine:
            iteration = _TimedIteration(engine, prompts)
            gc.collect()
            if importlib.util.find_spec("trl") is None:
                for _ in range(iterations):
                    iteration()
                return Seed(engine=iteration.run, peer=None)
            peer = run_in_turns(folder, task, prompts, seed=seed, iterations=iterations, other=iteration)
            return Seed(engine=iteration.run, peer=peer)


def gain(rewards: Sequence[float]) -> float:
    """Return how far the mean reward of the last three iterations is above the first one's."""
    return fmean(rewards[-_LAST:]) - rewards[0]


def verdict(seeds: Sequence[Seed]) -> str:
    """Return the verdict on both targets, time and learning, in two sentences."""
    if any(seed.peer is None for seed in seeds):
        return "Not shown: TRL is not installed."
    engine_s, peer_s = (
        median(s for seed in seeds for s in getattr(seed, name).seconds[WARM_UP_ITERATIONS:])
        for name in ("engine", "peer")
    )
    ratio = peer_s / engine_s
    gaps = [gain(seed.engine.rewards) - gain(seed.peer.rewards) for seed in seeds]
    spread = stdev(gaps) if len(gaps) > 1 else 0.0
    judged = "no worse" if fmean(gaps) >= -spread else "worse"
    speed = "met" if ratio >= TARGET_RATIO else "missed"
    return (
        f"an iteration takes {engine_s:.2f} s against TRL's {peer_s:.2f} s, {ratio:.2f} × as fast ({speed}). "
        f"Learning is {judged}: the gain in reward differs by {fmean(gaps):+.3f} ± {spread:.3f} over "
        f"{len(gaps)} seeds."
    )


def row_of(name: str, task: PeerTask, seeds: Sequence[Seed], command: str) -> Row:
    """Return the row of a task at a thread count: times over all seeds, rewards as means over them."""
    if seeds[0].peer is None:
        peer = Entry(name="TRL's PPO", status="absent: trl is not installed")
    else:
        peer = _entry(f"TRL {version('trl')}, experimental.ppo", [seed.peer for seed in seeds])
    return Row(
        row=name,
        what=f"an iteration, {task.name}: {PROMPTS} answers, then one update on them",
        shape=f"prompts of {_span(task.prompt_tokens)} tokens, answers of {'up to ' * task.stops}"
        f"{task.max_answer_tokens}, fp32",
        command=command,
        entries=[_entry("ours", [seed.engine for seed in seeds]), peer],
        work=(float(PROMPTS), "samples"),
    )


def report(rows: Sequence[Row], verdicts: str) -> Report:
    """Return the report of all rows."""
    return Report(
        title="PPO against TRL's, CPU",
        claim=f"Target: an iteration in at most half of TRL's time, the reward per sample no worse (by more "
        f"than the spread over seeds). Measured: {verdicts}",
        machine=description(torch.device("cpu")),
        rows=rows,
        notes=(
            f"model: GLM of {shape_text(SHAPE)}; random weights, the same folders for both",
            f"reward: the share of an answer's ids that are below {LOW_IDS}; {PROMPTS} "
            "random prompts, the same in every iteration",
            "full lengths: no stop id, so that nothing is padded. Answers that stop: at an id which "
            f"random weights draw at one token in {SHAPE['vocab_size']}; how long answers are in later "
            "iterations is each contender's own, see `answer tokens`",
            f"both: one epoch, one mini-batch, one micro-batch; lr {LR} constant for policy and critic, "
            f"Adam with betas {ADAM_BETAS}, no clipping of the gradient, clip {CLIP} for ratios and values, "
            f"kl_coef {KL_COEF} (k1), gamma {GAMMA}, lambda {LAM}, advantages whitened, temperature 1",
            "in turns, in one process: after each of TRL's iterations one of ours runs, outside its time; "
            f"the first {WARM_UP_ITERATIONS} iterations of a seed are not in the times. What lived before "
            "the first iteration is frozen for the garbage collector, which TRL calls in every iteration: "
            "that is in TRL's favour",
            f"lengths like real ones: prompts have {REAL_SCALE} times the lengths of hh-rlhf's in ChatGLM3's "
            "tokenizer (quantiles: `ppo_peers_task.REAL_PROMPT_TOKENS`), so that they leave answers room in "
            f"the model's positions, and at most {MAX_PROMPT_TOKENS} tokens; answers that stop. TRL gets "
            "them padded on the left, which it masks; nothing is sorted or grouped",
            "samples come of different random numbers: rewards are compared over seeds, as means",
            "reward at N: mean reward of the answers of iteration N, before its update",
        ),
    )


class _TimedIteration:
    """One iteration of ours per call, timed."""

    def __init__(self, engine: PPOEngine, prompts: Sequence[Sequence[int]]) -> None:
        self._engine = engine
        self._prompts = [PromptInput(tokens=tuple(prompt), extra={}) for prompt in prompts]
        self.run = Run()

    def __call__(self) -> None:
        phases = Phases()
        with phases.phase("iteration"):
            with phases.phase("generate"):
                rollouts = self._engine.generate(self._prompts)
            with phases.phase("experience"):
                experience = self._engine.make_experience(rollouts)
            with phases.phase("update"):
                metrics = self._engine.update(experience)
        seconds = phases.seconds | {name: metrics[name] for name in ("timing_s/critic", "timing_s/policy")}
        self.run.seconds.append(seconds.pop("timing_s/iteration"))
        self.run.phases.append(seconds)
        self.run.rewards.append(float(experience.rewards_B.mean()))
        self.run.lengths.append(float(rollouts.action_mask_T.sum()) / len(self._prompts))


def _entry(name: str, runs: Sequence[Run]) -> Entry:
    figures = {f"reward at {n}": fmean(run.rewards[n - 1] for run in runs) for n in _marks(runs[0])}
    figures["answer tokens"] = fmean(n for run in runs for n in run.lengths[WARM_UP_ITERATIONS:])
    gains = [gain(run.rewards) for run in runs]
    figures |= {"gain": fmean(gains), "gain, lowest seed": min(gains), "gain, highest seed": max(gains)}
    for phase in runs[0].phases[0] if runs[0].phases else ():
        figures[f"{phase.removeprefix('timing_s/')} ms"] = 1e3 * median(
            seconds[phase] for run in runs for seconds in run.phases[WARM_UP_ITERATIONS:]
        )
    seconds = [s for run in runs for s in run.seconds[WARM_UP_ITERATIONS:]]
    return Entry(name=name, timing=summary(seconds), figures=figures)


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low} to {high}, {fmean(lengths):.1f} on average,"


def _marks(run: Run) -> list[int]:
    return sorted({1, *range(5, len(run.rewards) + 1, 5), len(run.rewards)})


def _config(folder: Path, task: PeerTask, seed: int) -> PPOConfig:
    return PPOConfig(
        run=TrainingRunSection(name="ppo", output=str(folder / "ours"), seed=seed),
        model=ModelSection(path=str(folder / "policy")),
        critic=CriticSection(path=str(folder / "critic"), lr=LR),
        reward=PPORewardSection(function=f"{reward.__module__}:reward"),
        data=PPOPromptsSection(path="none: prompts are sampled"),
        generation=GenerationSection(max_new_tokens=task.max_answer_tokens, max_batch=PROMPTS),
        optimizer=OptimizerSection(lr=LR, betas=ADAM_BETAS, clip_grad=0.0),
        train=PPOTrainSection(steps=1, dtype="fp32"),
        ppo=PPOSection(
            clip=CLIP,
            value_clip=CLIP,
            gamma=GAMMA,
            lam=LAM,
            kl_coef=KL_COEF,
            whiten=True,
            reference_baseline=False,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
