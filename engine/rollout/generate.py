"""Answers of a policy to a list of prompts, as rollouts of this rank's data-parallel share."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout.generation_layout import weights_for_generation
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase, deal_by_length
from glm_rlhf.engine.rollout.scheduling.request_queue import Completion, GenerationRequest
from glm_rlhf.engine.rollout.stop_strings import StopCheck
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.nonfinite import raise_if_nonfinite
from glm_rlhf.parallel.runtime.preemption import Preempted, preemption_requested
from glm_rlhf.parallel.runtime.topology import Topology

OnEnded = Callable[[int, PromptInput, Completion], None]
"""Takes an answer: its place among those of all data-parallel ranks, its prompt, and what was generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How prompts are answered: a config's section, and what it means for a tokenizer and a model."""

    generation: GenerationSection
    """The section: answers per prompt, longest answer, how much at once."""
    sampling: SamplingSettings
    """The distribution of tokens."""
    stop_ids: frozenset[int]
    """Ids that end an answer, the model's own included."""
    stop_check: StopCheck | None = None
    """Ends an answer beside its stop ids; None for those alone."""

    @property
    def num_samples(self) -> int:
        """Answers to each prompt."""
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
) -> Rollouts:
    """Return this data-parallel rank's share of the answers; every rank gives the same prompts.

    Prompts are dealt over data-parallel ranks by length. Ranks that share their micro-batches by context
    parallelism hold whole models: each answers a part of the share, and all of them get all of it. The
    weights stay where they are; the cache is gone when this returns. In a second layout the prompts are dealt
    over its copies of the model, and every rank gets its share of what all of them answered.

    Args:
        chunks: this rank's chunks of the policy, bare.
        prompts: at least one.
        settings: how they are answered.
        seed: of this call; the answer to prompt i depends on it and on i, not on the layout.
        topology: layout and groups of `chunks`.
        is_share: whether `prompts` is this data-parallel rank's own share already.
        resharded: the same policy in a second layout, which then generates; not with `is_share`.
        on_ended: is given each answer of this rank's share that this rank generates, as it ends.
        when_idle: as for `GenerationPhase.run`.

    Raises:
        ValueError: no prompts, or one that leaves no room for an answer; its place is named.
        FloatingPointError: logits on some rank are not finite; on every rank of the world.
        Preempted: a rank was asked to leave; on every rank of the world.
    """
    if len(prompts) < (1 if is_share else topology.dp):
        raise ValueError(
            f"{len(prompts)} prompts for {topology.dp} data-parallel copies of the model: give each at "
            "least one"
        )
    context = chunks[0].glm.max_positions
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt.tokens) < context:
            raise ValueError(
                f"prompt {index} has {len(prompt.tokens)} tokens, required are 1 to {context - 1}: the "
                f"model's context is {context}"
            )
    lengths = [len(prompt.tokens) for prompt in prompts]
    dp = (0, 1) if is_share else (topology.dp_rank, topology.dp)
    share = sorted(deal_by_length(lengths, rank=dp[0], num_ranks=dp[1]))
    mine_alone = set(share)
    dealt, copies = share, topology.cp_group
    if resharded is not None:
        assert not is_share, "in a second layout other ranks share a copy of the model"
        dealt, copies = list(range(len(prompts))), resharded.topology.dp_group
    mine = [
        dealt[place]
        for place in deal_by_length([lengths[i] for i in dealt], rank=copies.rank(), num_ranks=copies.size())
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
        found, findings = [], []
        try:
            for done in phase.run(
                requests, settings.sampling, stop_check=settings.stop_check, when_idle=when_idle
            ):
                found.append(done)
                if on_ended is not None and done.request in mine_alone:
                    on_ended(_index(done, settings), prompts[done.request], done)
        except FloatingPointError as error:  # on every rank of this copy of the model; others go on
            findings = [str(error)]
        except Preempted:  # likewise
            found = []
        raise_if_nonfinite(findings, "these prompts are not answered", device=topology.device)
        if preemption_requested((None, topology.device)):
            raise Preempted
    if copies.size() > 1:
        everyone: list[list[Completion]] = [[] for _ in range(copies.size())]
        dist.all_gather_object(everyone, found, group=copies)
        found = [completion for part in everyone for completion in part]
    found = [done for done in found if done.request in mine_alone]
    found.sort(key=lambda done: (done.request, done.sample))
    return _as_rollouts(found, prompts, settings, topology)


def _fingerprint(prompt: PromptInput) -> int:
    """Return a number below 2^32 that follows from the prompt alone."""
    return zlib.crc32(",".join(map(str, prompt.tokens)).encode())


def _index(done: Completion, settings: AnswerSettings) -> int:
    """Return an answer's place among those to all prompts."""
    return done.request * settings.num_samples + done.sample


def _as_rollouts(
    found: Sequence[Completion],
    prompts: Sequence[PromptInput],
    settings: AnswerSettings,
    topology: Topology,
) -> Rollouts:
    tokens, logprobs = [], []
    for done in found:
        prompt = prompts[done.request].tokens
        tokens += [*prompt, *done.tokens]
        logprobs += [0.0] * len(prompt) + list(done.untempered_logprobs)
    used = tuple(prompts[done.request] for done in found)
    return Rollouts(
        tokens_T=torch.tensor(tokens, dtype=torch.int64, device=topology.device),
        lengths=tuple(
            len(prompt.tokens) + len(done.tokens) for prompt, done in zip(used, found, strict=True)
        ),
        prompt_lengths=tuple(len(prompt.tokens) for prompt in used),
        prompts=used,
        is_finished=tuple(done.finish_reason == "stop" for done in found),
        logprobs_T=torch.tensor(logprobs, dtype=torch.float32, device=topology.device),
        temperature=settings.sampling.temperature,
        indices=tuple(_index(done, settings) for done in found),
        num_global=len(prompts) * settings.num_samples,
    )
