"""Estimated memory of PPO on one rank, by phase, under a layout; nothing is allocated."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glm_rlhf.engine.cost.activations import CUDA, Kernels, RankMicroBatch
from glm_rlhf.engine.cost.workload import Choice, Roles, Workload
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.pipeline_order import num_in_flight
from glm_rlhf.parallel.spec.shard_sizes import ChunkSizes, chunk_sizes
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES

TRAINED = ("policy", "critic")
_FP32 = 4
_EXPERIENCE_BYTES = 8 + 7 * _FP32
"""Bytes per token of the experience: its id, and seven numbers in fp32."""
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
"""Elements to which Megatron-core pads each parameter, and each buffer, of the distributed optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBytes:
    """Bytes that one role holds on a rank in all phases."""

    weights: int
    """Weights; of a trained role in the buffers of the distributed optimizer."""
    gradients: int = 0
    """Gradient buffers, fp32."""
    masters: int = 0
    """This rank's shard of the optimizer's fp32 weights."""
    moments: int = 0
    """This rank's shard of the two Adam moments, allocated by the first step."""

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return self.masters + self.moments

    @property
    def total(self) -> int:
        """All bytes of the role."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank."""

    stage: int
    """Its pipeline stage."""
    roles: dict[str, RoleBytes]
    """What each role holds from the first step on."""
    phases: dict[str, int]
    """What each phase takes in addition to the roles, minus what is offloaded in it, without the key/value
    cache. Negative for `start` if the roles hold less at the start than later."""
    cache_page: int
    """One page of the key/value cache: the larger one of policy and reference."""

    @property
    def resident(self) -> int:
        """Bytes that all roles hold."""
        return sum(role.total for role in self.roles.values())

    @property
    def peak(self) -> int:
        """Peak over all phases, without the key/value cache."""
        return self.resident + max(self.phases.values())


def fullest_rank(
    roles: Roles, work: Workload, choice: Choice, *, num_gpus: int, kernels: Kernels = CUDA
) -> RankMemory:
    """Return the memory of the rank with the highest peak, which is in the first or the last stage.

    Stages between them hold neither embedding nor head, and fewer micro-batches in flight than the first.

    Raises:
        ValueError: the layout does not split a model evenly, or does not divide the GPUs.
    """
    stages = {0, choice.layout.pp - 1}
    ranks = [rank_memory(roles, work, choice, num_gpus=num_gpus, stage=s, kernels=kernels) for s in stages]
    return max(ranks, key=lambda rank: rank.peak)


def rank_memory(
    roles: Roles, work: Workload, choice: Choice, *, num_gpus: int, stage: int, kernels: Kernels = CUDA
) -> RankMemory:
    """Return the memory of a rank of pipeline stage `stage`.

    Phases: `start` (optimizers are created, each with a copy of its weights), `generate` (without the cache),
    `score`, `train policy`, `train critic` (with pipeline stages one phase, `train`), `step` (temporary
    memory of the optimizer).

    Raises:
        ValueError: as `fullest_rank`.
    """
    layout = choice.layout
    num_shards = layout.dp(num_gpus) * layout.cp
    held = {
        name: role_bytes(model, layout, stage=stage, itemsize=work.itemsize, num_shards=num_shards, role=name)
        for name, model in roles.items
    }
    length = work.longest
    experience = choice.num_sequences(work, num_gpus) * length * _EXPERIENCE_BYTES

    def batch(model: GLMConfig) -> RankMicroBatch:
        num_tokens = choice.batch_tokens(work, num_gpus, length=length)
        return RankMicroBatch(
            model=model, layout=layout, num_tokens=num_tokens, itemsize=work.itemsize, kernels=kernels
        )

    num_in_step = choice.num_micro_batches(work, num_gpus, length=length, minibatches=work.minibatches)
    share = work.max_new_tokens / length
    answering = (roles.policy, roles.reference)
    phases = {
        "start": _start_bytes(held),
        "generate": max(
            *(generation_bytes(m, work, choice, num_gpus=num_gpus) for m in answering),
            _overlapped_score_bytes(roles, work, choice),
        ),
        "score": experience + max(batch(model).forward_workspace_bytes() for _, model in roles.items),
    }
    trained = {name: (batch(getattr(roles, name)), share if name == "policy" else None) for name in TRAINED}
    # With pipeline stages, both share one schedule.
    together = {"train": list(trained.values())}
    apart = {f"train {name}": [one] for name, one in trained.items()}
    for phase, batches in (together if layout.pp > 1 else apart).items():
        phases[phase] = experience + training_bytes(
            batches, choice.recompute_layers, stage=stage, num_micro_batches=num_in_step
        )
    phases["step"] = experience + max(held[name].moments // 2 for name in TRAINED)
    for phase, offloaded in _offloaded_bytes(held, work, phases).items():
        phases[phase] -= offloaded
    cache_page = max(page_bytes(model, layout, work) for model in answering)
    return RankMemory(stage=stage, roles=held, phases=phases, cache_page=cache_page)


def role_bytes(
    model: GLMConfig, layout: Layout, *, stage: int, itemsize: int, num_shards: int, role: str
) -> RoleBytes:
    """Return the bytes of a role's weights, gradient buffers and optimizer state on a rank.

    Trained roles have fp32 gradients. The optimizer's fp32 weights (none if the weights are fp32) and two
    moments are sharded over `num_shards` = dp × cp ranks.
    """
    chunks = [
        chunk_sizes(model, layout, has_scalar_head=role in SCALAR_ROLES, stage=stage, chunk=chunk)
        for chunk in range(layout.vpp)
    ]
    if role not in TRAINED:
        return RoleBytes(weights=sum(c.num_model_dtype * itemsize + c.num_fp32 * _FP32 for c in chunks))
    plain, fp32 = (sum(sizes) for sizes in zip(*(_buffers(c, num_shards) for c in chunks), strict=True))
    return RoleBytes(
        weights=plain * itemsize + fp32 * _FP32,
        gradients=(plain + fp32) * _FP32,
        masters=plain * _FP32 // num_shards if itemsize != _FP32 else 0,
        moments=2 * (plain + fp32) * _FP32 // num_shards,
    )


def _offloaded_bytes(held: dict[str, RoleBytes], work: Workload, phases: Iterable[str]) -> dict[str, int]:
    """Return the bytes offloaded in each phase; baseline answers are generated with all models loaded."""
    optimizers = sum(held[name].optimizer + held[name].gradients for name in TRAINED)
    frozen = sum(role.weights for name, role in held.items() if name in work.offloads)
    by_phase = {"generate": optimizers, "score": optimizers} if "optimizers" in work.offloads else {}
    return by_phase | {name: frozen for name in phases if name.startswith("train") or name == "step"}


def _buffers(chunk: ChunkSizes, num_shards: int) -> tuple[int, int]:
    """Return the elements of the distributed optimizer's buffers for a chunk: model dtype, fp32."""
    multiple = math.lcm(num_shards, _BUCKET_ALIGNMENT)
    padded = []
    for sizes in (chunk.model_dtype, chunk.fp32):
        total = sum(_up_to(size, _PARAMETER_ALIGNMENT) for size in sizes)
        padded.append(_up_to(total, multiple))
    return padded[0], padded[1]


def _start_bytes(held: dict[str, RoleBytes]) -> int:
    """Return by how much creating the critic's optimizer, the last one, exceeds the bytes held later.

    Its weights exist twice while they are copied to its buffers, before its fp32 weights are created; moments
    are allocated by the first step.
    """
    critic = held["critic"]
    return max(0, critic.weights - critic.masters) - sum(role.moments for role in held.values())


def training_bytes(
    batches: Sequence[tuple[RankMicroBatch, float | None]],
    recomputes: bool,
    *,
    stage: int,
    num_micro_batches: int,
) -> int:
    """Return the peak bytes of forward and backward of one optimizer step on a rank.

    Args:
        batches: a full micro-batch of each model in the schedule, with the share of its tokens that are
            trained on; None for a scalar head, which reads all tokens.
        recomputes: whether backward recomputes the activations of each layer.
        stage: of the rank.
        num_micro_batches: of each model in the step, per data-parallel rank.
    """
    layout = batches[0][0].layout
    kept = [
        batch.chunk_saved_bytes(batch.model.num_layers // (layout.pp * layout.vpp), recomputes=recomputes)
        for batch, _ in batches
    ]
    in_flight = num_in_flight(layout, num_micro_batches * len(batches), stage=stage)
    passes = sorted((size for size in kept for _ in range(num_micro_batches * layout.vpp)), reverse=True)
    saved = sum(passes[:in_flight])  # those of the larger model first
    return saved + max(_pass_bytes(batch, share, recomputes, stage=stage) for batch, share in batches)


def _pass_bytes(batch: RankMicroBatch, trained_share: float | None, recomputes: bool, *, stage: int) -> int:
    """Return the peak bytes of a pass, in addition to those saved for backward."""
    layer = batch.backward_workspace_bytes(recomputes=recomputes)
    if stage < batch.layout.pp - 1:
        return layer + batch.residual_bytes  # the gradient that came from the next stage
    if trained_share is None:
        at_loss, kept = batch.value_loss_bytes()
    else:
        at_loss, kept = batch.policy_loss_bytes(math.ceil(batch.rows * trained_share))
    return max(at_loss, kept + batch.hidden_bytes, layer + batch.residual_bytes)


def generation_bytes(model: GLMConfig, work: Workload, choice: Choice, *, num_gpus: int) -> int:
    """Return the peak bytes of a step of generation, without the cache: those of a full prefill step."""
    layout = choice.layout
    num_sequences = min(work.max_batch, choice.num_sequences(work, num_gpus))
    num_prompts = -(-num_sequences // work.num_samples)  # samples share their prompt's pages
    rows = min(work.max_step_tokens, num_prompts * work.max_prompt_tokens)
    plain = RankMicroBatch(
        model=model, layout=Layout(tp=layout.tp, pp=layout.pp), num_tokens=rows, itemsize=work.itemsize
    )
    num_sampled = -(-num_sequences // layout.pp)
    logits = 2 * num_sampled * (model.rows_per_rank(layout.tp)) * _FP32
    return max(plain.forward_workspace_bytes(), logits)


def _overlapped_score_bytes(roles: Roles, work: Workload, choice: Choice) -> int:
    """Return the peak bytes of `ppo.overlap_scoring`: of a forward pass over the longest answer."""
    if choice.layout.pp == 1 or choice.layout.cp > 1:
        return 0
    options = {"layout": choice.layout, "num_tokens": work.longest, "itemsize": work.itemsize}
    return max(RankMicroBatch(model=model, **options).forward_workspace_bytes() for _, model in roles.items)


def page_bytes(model: GLMConfig, layout: Layout, work: Workload) -> int:
    """Return the bytes of a page: keys and values of its positions in all layers of the rank."""
    num_heads = max(1, model.num_kv_heads // layout.tp)
    elements = 2 * (model.num_layers // layout.pp) * work.page_size * num_heads * model.head_size
    return elements * work.itemsize


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
