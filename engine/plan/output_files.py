"""The files of a plan: the config of `ppo`, and scripts that launch it."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from glm_rlhf.engine.config.load import dump_config
from glm_rlhf.engine.config.plan import PlanConfig
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.config.rl import (
    CriticSection,
    PPOConfig,
    PPOPromptsSection,
    PPOSection,
    PPOTrainSection,
)
from glm_rlhf.engine.config.sections import GenerationSection, ModelSection, ParallelSection
from glm_rlhf.engine.config.training import OptionalModelSection, TrainingRunSection
from glm_rlhf.engine.cost.save_time import save_s
from glm_rlhf.engine.plan.search import LayoutPlan, layout_name
from glm_rlhf.parallel.storage.durable_io import replace_text

REWARD_PLACEHOLDER = "path/to/reward-model"
_SIGNAL_MARGIN_S = 60
_LONGEST_SIGNAL_S = 65535
"""Slurm's limit."""
CONFIG_NAME, TORCHRUN_NAME, SLURM_NAME = "ppo.yaml", "torchrun.sh", "slurm.sbatch"


def ppo_config(config: PlanConfig, plan: LayoutPlan) -> PPOConfig:
    """Return the config of `ppo` for a plan; settings that a plan does not choose have their defaults."""
    layout = plan.choice.layout
    reward_path = config.reward.path
    if reward_path is None and config.reward.function is None:
        reward_path = REWARD_PLACEHOLDER
    return PPOConfig(
        run=TrainingRunSection(name="ppo"),
        model=ModelSection(path=config.model.path),
        critic=CriticSection(path=config.critic.path),
        reward=PPORewardSection(path=reward_path, function=config.reward.function),
        reference=OptionalModelSection(path=config.reference.path),
        parallel=ParallelSection(
            tp=layout.tp,
            pp=layout.pp,
            vpp=layout.vpp,
            cp=layout.cp,
            sequence_parallel=layout.sequence_parallel,
        ),
        data=PPOPromptsSection(path=config.data.path, max_prompt_tokens=config.data.max_prompt_tokens),
        generation=GenerationSection(
            max_new_tokens=config.generation.max_new_tokens,
            temperature=config.generation.temperature,
            num_samples=config.generation.num_samples,
            max_batch=plan.max_batch,
            page_size=config.generation.page_size,
            cache_bytes=plan.cache_bytes,
            max_step_tokens=config.generation.max_step_tokens,
        ),
        train=PPOTrainSection(
            steps=config.train.steps,
            global_batch_size=config.train.global_batch_size,
            micro_batch_tokens=plan.choice.micro_batch_tokens,
            dtype=config.train.dtype,
            recompute_layers=plan.choice.recompute_layers,
            offload=config.train.offload,
        ),
        ppo=PPOSection(
            epochs=config.ppo.epochs,
            minibatches=config.ppo.minibatches,
            reference_baseline=config.ppo.reference_baseline,
        ),
    )


def write_files(config: PlanConfig, plan: LayoutPlan, checkpoint: int) -> list[Path]:
    """Write the config and both launch scripts to the run folder; return their paths.

    Args:
        config: of the command.
        plan: the one to run.
        checkpoint: bytes of one.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(config.run.output)
    layout = layout_name(plan.choice.layout, config.cluster.gpus)
    where = f"{config.cluster.gpus} × {config.cluster.gpu}"
    head = f"# {config.model.path} on {where}: {layout}, by `glm-rlhf plan`.\n"
    warning = warning_before_end(config, plan, checkpoint)
    texts = {
        CONFIG_NAME: head + dump_config(ppo_config(config, plan)),
        TORCHRUN_NAME: torchrun_script(config, folder / CONFIG_NAME, warning),
        SLURM_NAME: slurm_script(config, folder / CONFIG_NAME, warning),
    }
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [folder / name for name in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndWarning:
    """The time that a run needs from a signal to its end."""

    seconds: int
    """The whole, with a margin."""
    reason: str
    """Its parts."""


def warning_before_end(config: PlanConfig, plan: LayoutPlan, checkpoint: int) -> EndWarning:
    """Return how long before the end of its time a job is to get a signal, so that it can save.

    A signal interrupts generation, but neither the scoring of an iteration nor an epoch of its update. Slurm
    sends it up to a minute early or late.

    Args:
        config: of the command.
        plan: the one to run.
        checkpoint: bytes of one.
    """
    phases = {name: phase.seconds for name, phase in plan.estimate.phases.items()}
    epoch_s = sum(seconds for name, seconds in phases.items() if name.startswith("train")) / config.ppo.epochs
    longest_s = max(phases.get("score", 0.0), epoch_s)
    write_s = save_s(checkpoint, config.cluster.disk)
    seconds = min(_up_to(longest_s + write_s + _SIGNAL_MARGIN_S, 10), _LONGEST_SIGNAL_S)
    return EndWarning(
        seconds=seconds,
        reason=(
            f"{longest_s:.0f} s for the longest phase that it does not interrupt, {write_s:.0f} s to save "
            f"{checkpoint / 1e9:.0f} GB, and {_SIGNAL_MARGIN_S} s"
        ),
    )


def torchrun_script(config: PlanConfig, path: Path, warning: EndWarning) -> str:
    """Return a script to run on each node; several nodes rendezvous at HEAD_NODE."""
    nodes, per_node = _nodes(config)
    where = (
        "--standalone"
        if nodes == 1
        else (f'--nnodes={nodes} --rdzv-backend=c10d --rdzv-id=ppo --rdzv-endpoint="$HEAD_NODE:29500"')
    )
    check = "" if nodes == 1 else ': "${HEAD_NODE:?set it to the name of the first node, the same on all}"\n'
    return (
        "#!/usr/bin/env bash\n"
        f"# Run on each of {nodes} node{'s' if nodes > 1 else ''}.\n"
        f"set -euo pipefail\n{check}{_shutdown(warning)}"
        f"exec torchrun {where} --nproc-per-node={per_node} \\\n"
        f'    -m glm_rlhf.engine ppo {shlex.quote(str(path))} "$@"\n'
    )


def slurm_script(config: PlanConfig, path: Path, warning: EndWarning) -> str:
    """Return a batch script for Slurm: one torchrun per node, with the rendezvous at the first node."""
    nodes, per_node = _nodes(config)
    return (
        "#!/usr/bin/env bash\n"
        "#SBATCH --job-name=glm-rlhf-ppo\n"
        f"#SBATCH --nodes={nodes}\n"
        "#SBATCH --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={per_node}\n"
        "#SBATCH --exclusive\n"
        "#SBATCH --output=%x-%j.log\n"
        f"# The run saves and exits when it gets the signal: {warning.reason}.\n"
        f"#SBATCH --signal=TERM@{warning.seconds}\n"
        f"set -euo pipefail\n{_shutdown(warning)}"
        'read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")\n'
        f"srun torchrun --nnodes={nodes} --nproc-per-node={per_node} \\\n"
        '    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:29500" \\\n'
        f"    -m glm_rlhf.engine ppo {shlex.quote(str(path))}\n"
    )


def _shutdown(warning: EndWarning) -> str:
    return (
        "# Seconds that torchrun leaves the ranks after a signal; where it does not read this, 30.\n"
        f'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{warning.seconds}}}"\n'
    )


def _up_to(seconds: float, multiple: int) -> int:
    return math.ceil(seconds / multiple) * multiple


def _nodes(config: PlanConfig) -> tuple[int, int]:
    cluster = config.cluster
    nodes = math.ceil(cluster.gpus / cluster.per_node)
    return nodes, cluster.gpus // nodes
