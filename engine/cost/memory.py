"""Memory of PPO on one rank, by phase, under a layout: arithmetic, nothing is allocated."""

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
"""A token of the experience: its id, and seven numbers in fp32."""
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
"""Elements to which Megatron-core fills up each parameter, and each buffer, of the distributed optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBytes:
    """What one role holds on a rank all the time."""

    weights: int
    """Weights, in the buffers of the distributed optimizer where they are trained."""
    gradients: int = 0
    """Gradient buffers, fp32."""
    masters: int = 0
    """This rank's share of the optimizer's fp32 weights."""
    moments: int = 0
    """This rank's share of Adam's two moments; they come with the first step."""

    @property
    def optimizer(self) -> int:
        """What the optimizer holds."""
        return self.masters + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank."""

    stage: int
    """Its pipeline stage."""
    roles: dict[str, RoleBytes]
    """What each role holds from the first step on."""
    phases: dict[str, int]
    """What each phase takes beside the roles, the key/value cache apart, less what is parked in it; `start`
    holds less than they do later where it is below 0."""
    cache_page: int
    """One page of the key/value cache, of the policy or the reference, whichever takes more."""

    @property
    def resident(self) -> int:
        """What all roles hold."""
        return sum(role.total for role in self.roles.values())

    @property
    def peak(self) -> int:
        """The fullest moment, without the key/value cache."""
        return self.resident + max(self.phases.values())


def fullest_rank(
    roles: Roles, work: Workload, choice: Choice, *, num_gpus: int, kernels: Kernels = CUDA
) -> RankMemory:
    """Return the rank that holds most: one of the first or of the last stage.

    Those between hold no embedding and no head, and fewer micro-batches in flight than the first.

    Raises:
        ValueError: the layout cannot split a model, or does not divide the GPUs.
    """
    stages = {0, choice.layout.pp - 1}
    found = [rank_memory(roles, work, choice, num_gpus=num_gpus, stage=s, kernels=kernels) for s in stages]
    return max(found, key=lambda rank: rank.peak)


def rank_memory(
    roles: Roles, work: Workload, choice: Choice, *, num_gpus: int, stage: int, kernels: Kernels = CUDA
) -> RankMemory:
    """Return the memory of a rank of pipeline stage `stage`.

    Phases: `start` (optimizers are made, each with a copy of its weights), `generate` (without the cache),
    `score`, `train policy`, `train critic` (over pipeline stages one, `train`), `step` (the optimizer's own
    temporaries).

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
            _early_score_bytes(roles, work, choice),
        ),
        "score": experience + max(batch(model).forward_workspace_bytes() for _, model in roles.items),
    }
    trained = {name: (batch(getattr(roles, name)), share if name == "policy" else None) for name in TRAINED}
    # Over pipeline stages both share a schedule.
    together = {"train": list(trained.values())}
    apart = {f"train {name}": [one] for name, one in trained.items()}
    for phase, batches in (together if layout.pp > 1 else apart).items():
        phases[phase] = experience + training_bytes(
            batches, choice.recompute_layers, stage=stage, num_micro_batches=num_in_step
        )
    phases["step"] = experience + max(held[name].moments // 2 for name in TRAINED)
    for phase, parked in _parked_bytes(held, work, phases).items():
        phases[phase] -= parked
    cache_page = max(page_bytes(model, layout, work) for model in answering)
    return RankMemory(stage=stage, roles=held, phases=phases, cache_page=cache_page)


def role_bytes(
    model: GLMConfig, layout: Layout, *, stage: int, itemsize: int, num_shards: int, role: str
) -> RoleBytes:
    """Return what a role's weights, gradient buffers and optimizer take on a rank.

    Trained roles keep fp32 gradients. The optimizer's fp32 weights (none beside fp32 weights) and two
    moments are split over `num_shards` = dp × cp ranks.
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


def _parked_bytes(held: dict[str, RoleBytes], work: Workload, phases: Iterable[str]) -> dict[str, int]:
    """Return what is in host memory in each phase; the reference's answers are generated with all models."""
    optimizers = sum(held[name].optimizer + held[name].gradients for name in TRAINED)
    frozen = sum(role.weights for name, role in held.items() if name in work.offloads)
    found = {"generate": optimizers, "score": optimizers} if "optimizers" in work.offloads else {}
    return found | {name: frozen for name in phases if name.startswith("train") or name == "step"}


def _buffers(chunk: ChunkSizes, num_shards: int) -> tuple[int, int]:
    """Return the elements of the buffers in which the distributed optimizer lays the weights out."""
    multiple = math.lcm(num_shards, _BUCKET_ALIGNMENT)
    padded = []
    for sizes in (chunk.model_dtype, chunk.fp32):
        total = sum(_up_to(size, _PARAMETER_ALIGNMENT) for size in sizes)
        padded.append(_up_to(total, multiple))
    return padded[0], padded[1]


def _start_bytes(held: dict[str, RoleBytes]) -> int:
    """Return by how much making the critic's optimizer, the last one, exceeds what is held later.

    Its weights are there twice while they move to its buffers, before its fp32 weights are made; moments
    come with the first step only.
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
    """Return what forward and backward of one optimizer step take on a rank at most.

    Args:
        batches: a full micro-batch of each model in the schedule, with the share of its tokens that are
            trained on; None for a scalar head, which reads all.
        recomputes: whether backward runs each layer again.
        stage: of the rank.
        num_micro_batches: of each model in the step, on this copy.
    """
    layout = batches[0][0].layout
    kept = [
        batch.chunk_saved_bytes(batch.model.num_layers // (layout.pp * layout.vpp), recomputes=recomputes)
        for batch, _ in batches
    ]
    in_flight = num_in_flight(layout, num_micro_batches * len(batches), stage=stage)
    passes = sorted((one for one in kept for _ in range(num_micro_batches * layout.vpp)), reverse=True)
    saved = sum(passes[:in_flight])  # of the larger model's, and where these are few of the other's
    return saved + max(_pass_bytes(batch, share, recomputes, stage=stage) for batch, share in batches)


def _pass_bytes(batch: RankMicroBatch, trained_share: float | None, recomputes: bool, *, stage: int) -> int:
    """Return what the fullest pass takes beside what is saved for backward."""
    layer = batch.backward_workspace_bytes(recomputes=recomputes)
    if stage < batch.layout.pp - 1:
        return layer + batch.residual_bytes  # the gradient that came from the next stage
    if trained_share is None:
        at_loss, kept = batch.value_loss_bytes()
    else:
        at_loss, kept = batch.policy_loss_bytes(math.ceil(batch.rows * trained_share))
    return max(at_loss, kept + batch.hidden_bytes, layer + batch.residual_bytes)


def generation_bytes(model: GLMConfig, work: Workload, choice: Choice, *, num_gpus: int) -> int:
    """Return what a step of generation takes at most, the cache apart: a full step of prompts."""
    layout = choice.layout
    num_sequences = min(work.max_batch, choice.num_sequences(work, num_gpus))
    num_prompts = -(-num_sequences // work.num_samples)  # samples share their prompt's pages
    rows = min(work.max_step_tokens, num_prompts * work.max_prompt_tokens)
    plain = RankMicroBatch(
        model=model, layout=Layout(tp=layout.tp, pp=layout.pp), num_tokens=rows, itemsize=work.itemsize
    )
    num_sampled = -(-num_sequences // layout.pp)
    logits = 2 * num_sampled * (model.vocab_size // layout.tp) * _FP32
    return max(plain.forward_workspace_bytes(), logits)


def _early_score_bytes(roles: Roles, work: Workload, choice: Choice) -> int:
    """Return what `ppo.overlap_scoring` takes at most: a forward pass over the longest answer."""
    if choice.layout.pp == 1 or choice.layout.cp > 1:
        return 0
    options = {"layout": choice.layout, "num_tokens": work.longest, "itemsize": work.itemsize}
    return max(RankMicroBatch(model=model, **options).forward_workspace_bytes() for _, model in roles.items)


def page_bytes(model: GLMConfig, layout: Layout, work: Workload) -> int:
    """Return a page of the cache: keys and values of its positions in every layer of the rank."""
    num_heads = max(1, model.num_kv_heads // layout.tp)
    elements = 2 * (model.num_layers // layout.pp) * work.page_size * num_heads * model.head_size
    return elements * work.itemsize


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
