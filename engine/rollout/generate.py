"""Generates a policy's answers to prompts, as the rollouts of this data-parallel rank."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_layout import weights_for_generation
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase, deal_by_length
from glm_rlhf.engine.rollout.scheduling.request_queue import Completion, GenerationRequest
from glm_rlhf.engine.rollout.scheduling.requests import NonFiniteLogits
from glm_rlhf.engine.rollout.stop_strings import StopCheck
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, raise_if_nonfinite
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.topology import Topology

OnEnded = Callable[[int, PromptInput, Completion], None]
"""Takes an answer: its index among those of all data-parallel ranks, its prompt, and its completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """Settings of answers: the config's section, and what follows from it for a tokenizer and a model."""

    generation: GenerationSection
    """The section: answers per prompt, longest answer, sizes of batch, step and cache."""
    sampling: SamplingSettings
    """The sampling distribution."""
    stop_ids: frozenset[int]
    """Ids that end an answer, those of the model included."""
    stop_check: StopCheck | None = None
    """Ends answers in addition to the stop ids; None: stop ids only."""

    @property
    def num_samples(self) -> int:
        """Answers per prompt."""
        return self.generation.num_samples

    def with_samples(self, num_samples: int) -> "AnswerSettings":
        """Return the same settings with another number of answers per prompt."""
        return replace(self, generation=replace(self.generation, num_samples=num_samples))


def answer_prompts(
    chunks: Sequence[GLMModel],
    prompts: Sequence[PromptInput],
    settings: AnswerSettings,
    *,
    seed: int,
    topology: Topology,
    is_share: bool = False,
    resharded: ReshardedWeights | None = None,
    on_ended: OnEnded | None = None,
    when_idle: Callable[[], None] | None = None,
    model: str = "the policy",
) -> Rollouts:
    """Return this data-parallel rank's share of the answers; every rank calls this with the same prompts.

    Prompts are assigned to data-parallel ranks by length. Context-parallel ranks hold whole models: each
    answers a part of the share, and all of them get the whole share. The weights are used in place; the cache
    is freed on return. In a generation layout, prompts are assigned to the replicas of that layout, and each
    rank gets its data-parallel share of all answers.

    Args:
        chunks: this rank's chunks of the policy, unwrapped.
        prompts: at least one.
        settings: sampling, batches and ends of answers.
        seed: of this call; the answer to prompt i depends on it and on i, not on the layout.
        topology: layout and groups of `chunks`.
        is_share: whether `prompts` is already the share of this data-parallel rank.
        resharded: the policy in a generation layout, which then generates; not with `is_share`.
        on_ended: called with each answer of this rank's share that this rank generates, when it ends.
        when_idle: as for `GenerationPhase.run`.
        model: what answers, for the message of an error.

    Raises:
        ValueError: no prompts, or a prompt that leaves no room for an answer; it names the prompt's index.
        FloatingPointError: logits on some rank are NaN or Inf; on all ranks of the world, with the prompts.
        Preempted: preemption was requested on some rank; on all ranks of the world.
    """
    if len(prompts) < (1 if is_share else topology.dp):
        raise ValueError(
            f"there are {len(prompts)} prompts for {topology.dp} data-parallel ranks: give at least one per "
            "rank"
        )
    context = chunks[0].glm.max_positions
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt.tokens) < context:
            raise ValueError(
                f"prompt {index} has {len(prompt.tokens)} tokens, it must have 1 to {context - 1}: the "
                f"model's context is {context}"
            )
    lengths = [len(prompt.tokens) for prompt in prompts]
    dp = (0, 1) if is_share else (topology.dp_rank, topology.dp)
    share = sorted(deal_by_length(lengths, rank=dp[0], num_ranks=dp[1]))
    in_share = set(share)
    indices, replicas = share, topology.cp_group  # prompts that these replicas answer together
    if resharded is not None:
        assert not is_share, "in a generation layout other ranks share a replica of the model"
        indices, replicas = list(range(len(prompts))), resharded.topology.dp_group
    mine = [
        indices[i]
        for i in deal_by_length(
            [lengths[index] for index in indices], rank=replicas.rank(), num_ranks=replicas.size()
        )
    ]
    requests = [
        GenerationRequest(
            index=index,
            prompt=prompts[index].tokens,
            num_samples=settings.num_samples,
            max_new_tokens=min(settings.generation.max_new_tokens, context - lengths[index]),
            stop_ids=settings.stop_ids,
            seed=(seed << 32) + (_fingerprint(prompts[index]) if is_share else index),
        )
        for index in mine
    ]
    longest = max(lengths) + settings.generation.max_new_tokens
    with (
        weights_for_generation(chunks, topology, resharded) as (weights, inner),
        GenerationPhase(weights, topology=inner, batch=settings.generation, longest=longest) as phase,
    ):
        completions, findings = [], []
        try:
            for done in phase.run(
                requests, settings.sampling, stop_check=settings.stop_check, when_idle=when_idle
            ):
                completions.append(done)
                if on_ended is not None and done.request in in_share:
                    on_ended(_index(done, settings), prompts[done.request], done)
        except NonFiniteLogits as error:  # on all ranks of this replica; other replicas continue
            findings = [f"{model}'s logits in the answers to prompts {abbreviate(error.requests)}"]
        except Preempted:  # likewise
            completions = []
        raise_if_nonfinite(findings, "these prompts are not answered", device=topology.device)
        if preemption_requested((None, topology.device)):
            raise Preempted
    if replicas.size() > 1:
        gathered: list[list[Completion]] = [[] for _ in range(replicas.size())]
        dist.all_gather_object(gathered, completions, group=replicas)
        completions = [completion for part in gathered for completion in part]
    completions = [done for done in completions if done.request in in_share]
    completions.sort(key=lambda done: (done.request, done.sample))
    return _as_rollouts(completions, prompts, settings, topology)


def _fingerprint(prompt: PromptInput) -> int:
    """Return a number below 2^32 that depends on the prompt only."""
    return zlib.crc32(",".join(map(str, prompt.tokens)).encode())


def _index(done: Completion, settings: AnswerSettings) -> int:
    """Return the index of an answer among the answers to all prompts."""
    return done.request * settings.num_samples + done.sample


def _as_rollouts(
    completions: Sequence[Completion],
    prompts: Sequence[PromptInput],
    settings: AnswerSettings,
    topology: Topology,
) -> Rollouts:
    tokens, logprobs = [], []
    for done in completions:
        prompt = prompts[done.request].tokens
        tokens += [*prompt, *done.tokens]
        logprobs += [0.0] * len(prompt) + list(done.untempered_logprobs)
    prompts_B = tuple(prompts[done.request] for done in completions)
    return Rollouts(
        tokens_T=torch.tensor(tokens, dtype=torch.int64, device=topology.device),
        lengths=tuple(
            len(prompt.tokens) + len(done.tokens) for prompt, done in zip(prompts_B, completions, strict=True)
        ),
        prompt_lengths=tuple(len(prompt.tokens) for prompt in prompts_B),
        prompts=prompts_B,
        is_finished=tuple(done.finish_reason == "stop" for done in completions),
        logprobs_T=torch.tensor(logprobs, dtype=torch.float32, device=topology.device),
        temperature=settings.sampling.temperature,
        indices=tuple(_index(done, settings) for done in completions),
        num_global=len(prompts) * settings.num_samples,
    )
