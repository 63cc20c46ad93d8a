"""The command `plan`: estimates memory and time of PPO on a cluster before a launch."""

import sys
from dataclasses import replace

from glm_rlhf.engine.config.load import save_config
from glm_rlhf.engine.config.plan import PlanConfig
from glm_rlhf.engine.cost.hardware import GPUS, Cluster, assumed_rates, read_rates, shape_of
from glm_rlhf.engine.cost.save_time import checkpoint_bytes
from glm_rlhf.engine.cost.workload import Roles, Workload
from glm_rlhf.engine.plan.output_files import write_files
from glm_rlhf.engine.plan.report import report
from glm_rlhf.engine.plan.search import Limits, search


def run(config: PlanConfig) -> None:
    """Print the best plans and write the config and launch scripts of the first one.

    Raises:
        ValueError: an invalid model, rates file or length, or no layout fits.
    """
    roles, work, cluster = roles_of(config), work_of(config), cluster_of(config)
    check_lengths(roles, work)
    plans = search(
        roles,
        work,
        cluster,
        limits=limits_of(config),
        has_baseline=config.ppo.reference_baseline,
        count=config.plan.alternatives,
    )
    sys.stdout.write(report(config, roles, work, cluster, plans))
    save_config(config, config.run.output)
    trained = ((roles.policy, False), (roles.critic, True))
    paths = write_files(config, plans[0], checkpoint_bytes(trained, itemsize=work.itemsize))
    sys.stdout.write(f"written: {', '.join(map(str, paths))}\n")


def roles_of(config: PlanConfig) -> Roles:
    """Return the shapes of all roles.

    Raises:
        ValueError: a path is neither a preset's name nor a readable folder.
    """
    policy = shape_of(config.model.path)
    reward = None
    if config.reward.path is not None or config.reward.function is None:
        reward = policy if config.reward.path is None else shape_of(config.reward.path)
    critic_path = config.critic.path
    reference_path = config.reference.path
    return Roles(
        policy=policy,
        critic=(reward or policy) if critic_path is None else shape_of(critic_path),
        reference=policy if reference_path is None else shape_of(reference_path),
        reward=reward,
    )


def work_of(config: PlanConfig) -> Workload:
    """Return the workload of an iteration."""
    data, generation = config.data, config.generation
    return Workload(
        max_prompt_tokens=data.max_prompt_tokens,
        max_new_tokens=generation.max_new_tokens,
        mean_prompt_tokens=data.mean_prompt_tokens or -(-data.max_prompt_tokens // 2),
        mean_new_tokens=generation.mean_new_tokens or -(-generation.max_new_tokens // 2),
        num_prompts=config.train.global_batch_size,
        num_samples=generation.num_samples,
        max_batch=generation.max_batch,
        max_step_tokens=generation.max_step_tokens,
        page_size=generation.page_size,
        itemsize=2 if config.train.dtype == "bf16" else 4,
        epochs=config.ppo.epochs,
        minibatches=config.ppo.minibatches,
        recomputes_logprobs=generation.temperature != 1.0,
        offloads=frozenset(config.train.offload),
    )


def check_lengths(roles: Roles, work: Workload) -> None:
    """Check that mean lengths are at most the longest ones, and that sequences fit the policy's context.

    Raises:
        ValueError: they do not.
    """
    for name, mean, longest in (
        ("data.mean_prompt_tokens", work.mean_prompt_tokens, work.max_prompt_tokens),
        ("generation.mean_new_tokens", work.mean_new_tokens, work.max_new_tokens),
    ):
        if mean > longest:
            raise ValueError(f"{name} is {mean}, above the longest length, {longest}")
    if work.longest > roles.policy.max_positions:
        raise ValueError(
            f"prompt and answer together have up to {work.longest} tokens, the policy's context is "
            f"{roles.policy.max_positions}: lower data.max_prompt_tokens or generation.max_new_tokens"
        )


def cluster_of(config: PlanConfig) -> Cluster:
    """Return the machines with their rates.

    Raises:
        ValueError: the rates file is invalid.
    """
    section = config.cluster
    gpu = GPUS[section.gpu]
    if section.memory is not None:
        gpu = replace(gpu, memory_bytes=section.memory)
    rates = (
        assumed_rates(gpu, network_bytes_per_s=section.network)
        if section.rates is None
        else read_rates(section.rates)
    )
    return Cluster(
        gpu=gpu,
        num_gpus=section.gpus,
        gpus_per_node=section.per_node,
        rates=rates,
        usable_bytes=int(gpu.memory_bytes * (1 - section.reserve)),
    )


def limits_of(config: PlanConfig) -> Limits:
    """Return the sizes that the user fixed."""
    axes = config.parallel
    return Limits(
        tp=axes.tp,
        pp=axes.pp,
        vpp=axes.vpp,
        cp=axes.cp,
        micro_batch_tokens=config.train.micro_batch_tokens,
        recompute_layers=config.train.recompute_layers,
    )
